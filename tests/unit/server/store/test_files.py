"""The file tier: what is damaged is found out, and what a dead process left is cleaned up."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sale_prefill_server.store import file_reader
from sale_prefill_server.store.base import CorruptError, FullError, Level, NotFoundError, UnavailableError
from sale_prefill_server.store.file_layer import FileLayer
from sale_prefill_server.store.files import FileTier
from tests.unit.server.store.samples import TENANT, block, block_key, blocks, digest, read_whole, record


def file_of(root: Path, name: object) -> Path:
    return root / "blocks" / TENANT / digest(name)[0] / f"{digest(name)}.kv"


def record_file(root: Path, name: object) -> Path:
    return root / "records" / TENANT / f"{digest(name)}.record"


def test_every_flipped_byte_of_a_block_is_found_and_never_used(tmp_path: Path) -> None:
    told: list[str] = []
    tier = FileTier(tmp_path, on_quarantine=lambda error, path: told.append(error.reason))
    written = block("a", layers=1, part_bytes=70)
    tier.put_blocks([written])
    good = file_of(tmp_path, "a").read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        file_of(tmp_path, "a").write_bytes(bad)
        with pytest.raises(CorruptError):
            read_whole(tier, written.key)
        assert not file_of(tmp_path, "a").exists()
    assert len(told) == len(good)
    assert len(list((tmp_path / "quarantine").iterdir())) == len(good)


def test_every_truncation_of_a_block_is_found(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    written = block("a", layers=1, part_bytes=40)
    tier.put_blocks([written])
    good = file_of(tmp_path, "a").read_bytes()
    for length in [*range(len(good)), len(good) + 1]:
        file_of(tmp_path, "a").write_bytes((good + b"x")[:length])
        with pytest.raises(CorruptError):
            read_whole(tier, written.key)


def test_a_file_cut_while_it_is_read_is_found(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    tier.put_blocks([block("a")])
    reader = tier.open_block(block_key("a"))
    os.truncate(file_of(tmp_path, "a"), 1500)
    with pytest.raises(CorruptError, match="ends within"):
        reader.read(4, [bytearray(reader.part_bytes)])
    reader.close()


def test_parts_in_another_order_are_found(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    written = block("a")
    tier.put_blocks([written])
    data = file_of(tmp_path, "a").read_bytes()
    header = len(data) - written.size_bytes
    parts = [data[header + i * written.part_bytes :][: written.part_bytes] for i in range(6)]
    parts[1], parts[4] = parts[4], parts[1]
    file_of(tmp_path, "a").write_bytes(data[:header] + b"".join(parts))
    with pytest.raises(CorruptError, match="part 1"):
        read_whole(tier, written.key)


def test_the_right_bytes_under_another_name_are_found(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    tier.put_blocks(blocks("a", "b"))
    shutil.copy(file_of(tmp_path, "b"), file_of(tmp_path, "a"))
    with pytest.raises(CorruptError, match="it holds block"):
        tier.open_block(block_key("a"))
    tier.put_record(record("s"))
    tier.put_record(record("t"))
    shutil.copy(record_file(tmp_path, "s"), record_file(tmp_path, "t"))
    with pytest.raises(CorruptError, match="it holds record"):
        tier.get_record(record("t").key)


def test_every_flip_and_cut_of_a_record_is_found(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    written = record("s", ("a", "b"), payload=b'{"tokens": [1, 2, 3]}')
    tier.put_record(written)
    good = record_file(tmp_path, "s").read_bytes()
    flipped = (good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :] for at in range(len(good)))
    for bad in [*flipped, *(good[:at] for at in range(len(good)))]:
        record_file(tmp_path, "s").write_bytes(bad)
        with pytest.raises(CorruptError):
            tier.get_record(written.key)
        with pytest.raises(NotFoundError):
            tier.get_record(written.key)


def test_a_block_that_was_put_aside_can_be_put_again(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    tier.put_blocks([block("a")])
    file_of(tmp_path, "a").write_bytes(b"rubbish")
    with pytest.raises(CorruptError, match="only 7 bytes"):
        tier.open_block(block_key("a"))
    tier.put_blocks([block("a")])
    assert read_whole(tier, block_key("a")) == list(block("a").parts)


def test_a_block_removed_while_it_is_read_stays_readable(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    tier.put_blocks([block("a")])
    reader = tier.open_block(block_key("a"))
    tier.delete_blocks([block_key("a")])
    part = bytearray(reader.part_bytes)
    reader.read(5, [part])
    reader.close()
    assert part == block("a").parts[5]
    with pytest.raises(UnavailableError, match="closed"):
        reader.read(5, [part])


def test_many_readers_share_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reader, "_KEPT_DESCRIPTORS", 4)
    tier = FileTier(tmp_path)
    written = blocks(*range(20))
    tier.put_blocks(written)
    before = len(list(Path("/proc/self/fd").iterdir()))
    readers = [tier.open_block(one.key) for one in written]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 4
    for one, reader in zip(written, readers, strict=True):
        part = bytearray(one.part_bytes)
        reader.read(3, [part])
        assert part == one.parts[3]
        reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_block_of_many_layers_has_its_header_read_whole(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    written = block("deep", layers=400, part_bytes=3)
    tier.put_blocks([written])
    assert read_whole(tier, written.key) == list(written.parts)


def test_servers_that_share_a_directory_see_each_others_blocks(tmp_path: Path) -> None:
    one, two = (FileTier(tmp_path, level=Level.SHARED) for _ in range(2))
    one.put_blocks([block("a")])
    two.put_blocks([block("a")])
    assert read_whole(two, block_key("a")) == list(block("a").parts)
    one.close()
    assert read_whole(two, block_key("a")) == list(block("a").parts)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    tier.put_blocks([block("a")])
    foreign = file_of(tmp_path, "a").with_name("notes.txt")
    foreign.write_text("mine")
    assert [key for key, _ in tier.list_blocks()] == [block_key("a")]
    assert foreign.exists()


def test_what_a_dead_process_was_writing_is_removed_and_a_living_ones_kept(tmp_path: Path) -> None:
    living = FileTier(tmp_path)
    dead = tmp_path / "staging" / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "7").write_bytes(b"half")
    FileTier(tmp_path).close()
    assert not dead.exists()
    living.put_blocks([block("a")])
    living.close()
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="file"):
        FileTier(tmp_path / "file" / "kv")


def test_a_write_that_the_system_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    tier.put_blocks([block("before")])
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(FullError, match="large"):
            tier.put_blocks(blocks("a", "b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [key for key, _ in tier.list_blocks()] == [block_key("before")]
    assert [file.name for file in (tmp_path / "staging").rglob("*") if file.is_file()] == ["lock"]
    tier.put_blocks(blocks("a", "b"))


class _Refusing(FileLayer):
    """Says "no space" at one operation."""

    refused = ""

    def __getattribute__(self, name: str) -> object:
        if name == object.__getattribute__(self, "refused"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().__getattribute__(name)


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename", "fsync_directory"])
def test_no_space_at_any_step_is_said_and_leaves_whole_files_only(tmp_path: Path, operation: str) -> None:
    layer = _Refusing()
    tier = FileTier(tmp_path, layer=layer)
    tier.put_blocks([block("before")])
    tier.put_record(record("s", ("before",)))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    layer.refused = operation
    with pytest.raises(FullError, match="No space"):
        tier.put_blocks(blocks("a", "b", "c"))
    with pytest.raises(FullError, match="No space"):
        tier.put_record(record("s", ("before", "a"), payload=b"newer"))
    layer.refused = ""
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert [file.name for file in (tmp_path / "staging").rglob("*") if file.is_file()] == ["lock"]
    for key, _ in tier.list_blocks():
        read_whole(tier, key)
    assert tier.get_record(record("s").key) in (
        record("s", ("before",)),
        record("s", ("before", "a"), payload=b"newer"),  # renamed, but not known to be safe
    )


_WRITER = """
import sys
from pathlib import Path
from sale_prefill_server.store.files import FileTier
from tests.unit.server.store.samples import blocks, record
tier = FileTier(Path(sys.argv[1]))
number = 0
while True:
    names = tuple(f"{sys.argv[2]}-{number}-{i}" for i in range(8))
    tier.put_blocks(blocks(*names))
    tier.put_record(record(f"{sys.argv[2]}-{number}", names))
    print(number, flush=True)
    number += 1
"""


def test_kill_9_in_the_middle_of_writing_loses_nothing_acknowledged(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for run in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(run)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(1 + run % 3):
            acknowledged.append(f"{run}-{writer.stdout.readline().strip()}")
        writer.kill()
        acknowledged.extend(f"{run}-{line.strip()}" for line in writer.stdout)
        writer.wait()
        tier = FileTier(tmp_path)
        for name in acknowledged:
            needed = tuple(f"{name}-{i}" for i in range(8))
            assert tier.get_record(record(name).key) == record(name, needed)
        for key in tier.list_records():
            for block_key_ in tier.get_record(key).block_keys:
                read_whole(tier, block_key_)
        tier.close()
    assert list((tmp_path / "staging").iterdir()) == []
    assert list((tmp_path / "quarantine").iterdir()) == []
    sample = acknowledged[-1]
    tier = FileTier(tmp_path)
    for i in range(8):
        assert read_whole(tier, block_key(f"{sample}-{i}")) == list(block(f"{sample}-{i}").parts)
    tier.close()
