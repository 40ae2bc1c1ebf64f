"""The S3 tier against a real server: damage is found, a server that is away or slow is said to be so, in time."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from sale_prefill_server.store.base import CorruptError, Level, NotFoundError, UnavailableError
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.sweep import sweep
from sale_prefill_server.store.tiers import TieredStore, TierSettings
from tests.unit.server.store.conftest import Bucket
from tests.unit.server.store.samples import block, block_key, blocks, read_whole, record
from tests.unit.server.store.stores import PATIENCE_SECONDS, read_all, true_parts


def only_object(bucket: Bucket) -> tuple[str, bytes]:
    return next(iter(bucket.objects("kv/blocks").items()))


def test_flipped_and_cut_objects_are_found_and_put_aside(bucket: Bucket) -> None:
    tier = bucket.tier()
    tier.put_blocks([block("a", layers=1, part_bytes=50)])
    name, good = only_object(bucket)
    bad = [good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :] for at in range(0, len(good), 23)]
    bad += [good[:at] for at in (0, 1, 100, len(good) - 60, len(good) - 1)] + [good + b"x"]
    for data in bad:
        bucket.overwrite(name, data)
        with pytest.raises(CorruptError):
            read_whole(tier, block_key("a"))
        with pytest.raises(NotFoundError):
            tier.open_block(block_key("a"))
    assert len(bucket.objects("kv/quarantine")) == len(bad)


def test_an_object_cut_while_it_is_read_is_found(bucket: Bucket) -> None:
    tier = bucket.tier()
    written = block("a", layers=10, part_bytes=200_000)
    tier.put_blocks([written])
    reader = tier.open_block(written.key)
    name, good = only_object(bucket)
    bucket.overwrite(name, good[: len(good) - 1_000_000])
    with pytest.raises(CorruptError):
        reader.read(18, [bytearray(200_000), bytearray(200_000)])


def test_a_record_under_another_name_is_found(bucket: Bucket) -> None:
    tier = bucket.tier()
    tier.put_record(record("s"))
    tier.put_record(record("t"))
    (first, data), (second, _) = bucket.objects("kv/records").items()
    bucket.overwrite(second, data)
    outcomes = []
    for key in (record("s").key, record("t").key):
        try:
            outcomes.append(tier.get_record(key).key == key)
        except CorruptError:
            outcomes.append(False)
    assert sorted(outcomes) == [False, True]
    assert list(bucket.objects("kv/records")) == [first]


def test_a_large_block_is_read_in_few_requests(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bucket.tier()
    written = block("a", layers=30, part_bytes=49_152)
    tier.put_blocks([written])
    requests: list[str] = []
    get = tier._client.get_object
    monkeypatch.setattr(tier._client, "get_object", lambda **arguments: requests.append("") or get(**arguments))
    reader = tier.open_block(written.key)
    for layer in range(30):
        into = [bytearray(49_152), bytearray(49_152)]
        reader.read(2 * layer, into)
        assert into == list(written.parts[2 * layer : 2 * layer + 2])
    assert len(requests) <= 4


def test_a_server_that_is_away_is_said_to_be_so(bucket: Bucket) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        bucket.endpoint_url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        tier = bucket.tier()
        for call in (
            lambda: tier.put_blocks([block("a")]),
            lambda: tier.find_blocks([block_key("a")]),
            lambda: tier.get_record(record("s").key),
            tier.list_records,
        ):
            with pytest.raises(UnavailableError):
                call()


def test_a_server_that_does_not_answer_is_given_up_in_time(bucket: Bucket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        bucket.endpoint_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tier = bucket.tier(connect_timeout_seconds=0.2, read_timeout_seconds=0.2)
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            tier.get_record(record("s").key)
        assert time.monotonic() - started < 4


def test_a_bucket_that_is_not_there_is_not_an_absent_block(bucket: Bucket) -> None:
    bucket.name = "nowhere"
    with pytest.raises(UnavailableError, match="NoSuchBucket"):
        bucket.tier().put_blocks([block("a")])


def test_a_session_is_promised_in_s3_and_restored_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    names = list(range(12))
    store = TieredStore([TierSettings(FileTier(tmp_path / "one")), TierSettings(bucket.tier())])
    store.put_blocks(blocks(*names))
    store.put_record(record("s", tuple(names)))
    store.flush(record("s").key, Level.SHARED, PATIENCE_SECONDS)
    store.close()
    store = TieredStore([TierSettings(FileTier(tmp_path / "two")), TierSettings(bucket.tier(), read_threads=8)])
    assert store.get_record(record("s").key) == record("s", tuple(names))
    assert read_all(store, names) == true_parts(names)
    store.close()


def test_sweeping_removes_old_blocks_that_no_record_needs(bucket: Bucket) -> None:
    tier = bucket.tier()
    tier.put_blocks(blocks("a", "b"))
    tier.put_record(record("s", ("a",)))
    assert sweep(tier, grace_seconds=3600) == 0
    assert sweep(tier, grace_seconds=-5) == 1
    assert [key for key, _ in tier.list_blocks()] == [block_key("a")]
