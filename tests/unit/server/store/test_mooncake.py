"""The Mooncake tier against a real master over TCP, where Mooncake is installed (extra `mooncake`, and libibverbs1)."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sale_prefill_server.store.base import Block, CorruptError, Level, NotFoundError, UnavailableError
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.tiers import TieredStore, TierSettings
from tests.unit.server.store.samples import OTHER_TENANT, block, block_key, blocks, read_whole, record
from tests.unit.server.store.stores import PATIENCE_SECONDS, read_all, true_parts

pytest.importorskip("mooncake.store", reason="Mooncake, or libibverbs1, is not installed", exc_type=ImportError)

_ROOM_BYTES = 64 * 2**20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def master() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of a master."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("mooncake_master")), f"-rpc_port={port}"]
    command += [f"-metrics_port={free_port()}", "-enable_metric_reporting=false"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}", process
        process.kill()


@pytest.fixture(scope="module")
def tier(master: tuple[str, subprocess.Popen[bytes]]) -> Iterator[Any]:
    from sale_prefill_server.store.mooncake import MooncakeTier

    made = MooncakeTier(master[0], local_host=f"127.0.0.1:{free_port()}", segment_bytes=_ROOM_BYTES)
    yield made
    made.close()


def test_what_was_put_is_read_back_and_found_by_tenant(tier: Any) -> None:
    tier.put_blocks(blocks("a", "b"))
    tier.put_blocks(blocks("a"))
    assert read_whole(tier, block_key("a")) == list(block("a").parts)
    assert set(tier.find_blocks([block_key("a"), block_key("b"), block_key("x")])) == {block_key("a"), block_key("b")}
    assert tier.find_blocks([block_key("a", OTHER_TENANT)]) == {}
    with pytest.raises(NotFoundError):
        tier.open_block(block_key("x"))


def test_parts_larger_than_the_staging_memory_are_read(tier: Any) -> None:
    large = block("large", layers=1, part_bytes=3 * 2**20 + 5)
    tier.put_blocks([large])
    assert read_whole(tier, large.key) == list(large.parts)
    tier.delete_blocks([large.key, large.key])
    assert tier.find_blocks([large.key]) == {}


def test_damaged_and_cut_objects_are_found_and_removed(tier: Any) -> None:
    from sale_prefill_server.store.format import encode_block_header

    written = block("d", layers=1, part_bytes=100)
    good = encode_block_header(written) + b"".join(written.parts)
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 37)]
    for bad in [*flipped, good[:-1], good[:50], good + b"x"]:
        tier._store.upsert_parts(f"{written.key.tenant}/{written.key.hash}.kv", bad)
        with pytest.raises(CorruptError):
            read_whole(tier, written.key)
        assert tier.find_blocks([written.key]) == {}


def test_it_is_a_cache_before_the_disk_and_gets_no_records(tier: Any, tmp_path: Path) -> None:
    names = list(range(8))
    store = TieredStore([TierSettings(tier), TierSettings(FileTier(tmp_path))])
    store.put_blocks(blocks(*names))
    store.put_record(record("s", tuple(names)))
    store.flush(record("s").key, Level.LOCAL, PATIENCE_SECONDS)
    store.flush_all(PATIENCE_SECONDS)
    assert store.locate([block_key(name) for name in names]).blocks_by_tier == {"mooncake": 8}
    assert read_all(store, names) == true_parts(names)
    tier.delete_blocks([block_key(3)])
    assert read_all(store, names) == true_parts(names)
    store.delete_record(record("s").key).result(PATIENCE_SECONDS)


def test_without_its_master_it_is_unavailable(tier: Any, master: tuple[str, subprocess.Popen[bytes]]) -> None:
    master[1].kill()
    master[1].wait()
    with pytest.raises(UnavailableError):
        tier.put_blocks([Block(block_key("late"), [b"x"])])
    with pytest.raises(UnavailableError):
        tier.find_blocks([block_key("late")])
