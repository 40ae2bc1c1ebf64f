"""A tier that is slow, dead, full or lies costs time or a recomputation, never a wrong byte or a hang."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from sale_prefill_server.store.base import BlocksLostError, FullError, Level, UnavailableError
from sale_prefill_server.store.events import ObjectDamaged, TierDown, TierUp, WriteFailed
from tests.unit.server.store.samples import LAYERS, PART_BYTES, TENANT, block_key, blocks, digest, record
from tests.unit.server.store.stores import PATIENCE_SECONDS, Harness, read_all, true_parts


def saved(harness: Harness, names: str, *, level: Level = Level.SHARED) -> None:
    harness.store.put_blocks(blocks(*names), level=level)
    harness.store.put_record(record(names, tuple(names)), level=level)
    harness.store.flush(record(names).key, level, PATIENCE_SECONDS)
    harness.store.flush_all(PATIENCE_SECONDS)


def damage(root: Path, name: str, layer: int) -> None:
    """Flips the last byte of a layer's V."""
    file = root / "disk" / "blocks" / TENANT / digest(name)[0] / f"{digest(name)}.kv"
    data = bytearray(file.read_bytes())
    data[len(data) - (LAYERS - 1 - layer) * 2 * PART_BYTES - 1] ^= 1
    file.write_bytes(data)


def test_a_damaged_layer_of_one_block_comes_from_the_next_tier(tmp_path: Path) -> None:
    with Harness(tmp_path, shared=True) as harness:
        saved(harness, "abcdef")
        damage(tmp_path, "c", 1)
        assert read_all(harness.store, "abcdef") == true_parts("abcdef")
        assert [(event.tier, event.key) for event in harness.of(ObjectDamaged)] == [("disk", block_key("c"))]  # type: ignore[attr-defined]
        assert block_key("c") not in harness.blocks_in("disk")


def test_a_block_that_no_tier_has_whole_ends_the_read(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "abcdef", level=Level.LOCAL)
        damage(tmp_path, "c", 2)
        with pytest.raises(BlocksLostError, match="compute it again") as caught:
            read_all(harness.store, "abcdef")
        assert caught.value.block_index == 2
        assert read_all(harness.store, "abcdef") == true_parts("ab")


def test_flipped_bytes_all_over_a_stored_session_is_caught_or_repaired(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "ab", level=Level.LOCAL)
        file = tmp_path / "disk" / "blocks" / TENANT / digest("b")[0] / f"{digest('b')}.kv"
        good = file.read_bytes()
        for at in range(0, len(good), 29):
            file.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
            with pytest.raises(BlocksLostError):
                read_all(harness.store, "ab")
            harness.store.put_blocks(blocks("b"))
            harness.store.flush_all(PATIENCE_SECONDS)


def test_a_block_removed_behind_the_stores_back_is_a_miss(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "ab", level=Level.LOCAL)
        harness.tiers["disk"].tier.delete_blocks([block_key("b")])
        with pytest.raises(BlocksLostError):
            read_all(harness.store, "ab")
        assert read_all(harness.store, "ab") == true_parts("a")


def test_a_dead_tier_is_left_alone_until_it_works_again(tmp_path: Path) -> None:
    with Harness(tmp_path, shared=True, backoff_seconds=0.5) as harness:
        saved(harness, "ab")
        disk = harness.tiers["disk"]
        disk.die()
        assert read_all(harness.store, "ab") == true_parts("ab")
        assert [(event.tier, event.operation) for event in harness.of(TierDown)] == [("disk", "read")]  # type: ignore[attr-defined]
        assert not harness.store.status()["disk"].readable
        calls = len(disk.calls)
        assert read_all(harness.store, "ab") == true_parts("ab")
        assert len(disk.calls) == calls
        disk.heal()
        time.sleep(0.55)
        assert harness.store.locate([block_key("a")]).blocks_by_tier == {"disk": 1}
        time.sleep(0.55)
        assert read_all(harness.store, "ab") == true_parts("ab")
        assert harness.of(TierUp) == [TierUp("disk", "read")]


def test_a_tier_that_hangs_is_given_up_and_the_next_one_read(tmp_path: Path) -> None:
    with Harness(tmp_path, shared=True, read_timeout_seconds=0.5, backoff_seconds=30) as harness:
        saved(harness, "abcd")
        released = harness.tiers["disk"].hang()
        started = time.monotonic()
        assert read_all(harness.store, "abcd") == true_parts("abcd")
        assert 0.4 < time.monotonic() - started < 4
        assert "no progress" in harness.of(TierDown)[0].reason  # type: ignore[attr-defined]
        started = time.monotonic()
        assert read_all(harness.store, "abcd") == true_parts("abcd")
        assert time.monotonic() - started < 0.4
        released.set()


def test_a_tier_that_hangs_in_the_middle_never_writes_into_what_was_handed_out(tmp_path: Path) -> None:
    """The late read must not reach buffers that are in use again."""
    with Harness(tmp_path, shared=True, read_timeout_seconds=0.2) as harness:
        saved(harness, "abcd")
        disk, released, reads = harness.tiers["disk"], threading.Event(), []

        def hang_at_the_fifth_read(operation: str) -> None:
            if operation == "read":
                reads.append(operation)
                if len(reads) > 4:
                    released.wait(10)

        disk.before = hang_at_the_fifth_read
        located = harness.store.locate([block_key(name) for name in "abcd"])
        seen = []
        for part in harness.store.read(located, LAYERS, PART_BYTES):
            released.set()
            time.sleep(0.02)
            seen.append((bytes(part.keys), bytes(part.values)))
        expected = [
            (b"".join(p[2 * layer] for p in true_parts("abcd")), b"".join(p[2 * layer + 1] for p in true_parts("abcd")))
            for layer in range(LAYERS)
        ]
        assert seen == expected


def test_with_no_other_tier_a_hanging_one_is_a_miss_in_time(tmp_path: Path) -> None:
    with Harness(tmp_path, read_timeout_seconds=0.2) as harness:
        saved(harness, "ab", level=Level.LOCAL)
        released = harness.tiers["disk"].hang()
        with pytest.raises(BlocksLostError):
            read_all(harness.store, "ab")
        assert read_all(harness.store, "ab") == []
        released.set()


def test_a_read_ends_at_its_deadline(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "ab", level=Level.LOCAL)
        released = harness.tiers["disk"].hang()
        started = time.monotonic()
        with pytest.raises(BlocksLostError, match="deadline") as caught:
            read_all(harness.store, "ab", deadline_seconds=0.2)
        assert caught.value.block_index == 0
        assert time.monotonic() - started < 1
        released.set()


def test_a_shared_tier_that_hangs_costs_a_lookup_one_timeout(tmp_path: Path) -> None:
    with Harness(tmp_path, shared=True, read_timeout_seconds=0.2) as harness:
        released = harness.tiers["shared"].hang()
        started = time.monotonic()
        for _ in range(20):
            assert harness.store.locate([block_key("x")]).num_blocks == 0
        assert time.monotonic() - started < 1.5
        released.set()


def test_a_promise_is_not_given_while_the_tier_is_dead_and_is_when_it_is_back(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.tiers["disk"].die()
        harness.store.put_blocks(blocks("a"))
        harness.store.put_record(record("s", ("a",)))
        with pytest.raises(UnavailableError):
            harness.store.flush(record("s").key, Level.LOCAL, PATIENCE_SECONDS)
        assert harness.store.durability(record("s").key) is None
        assert harness.of(WriteFailed)
        harness.tiers["disk"].heal()
        time.sleep(0.06)
        saved(harness, "a", level=Level.LOCAL)


def test_a_dead_shared_tier_does_not_delay_the_disks_promise(tmp_path: Path) -> None:
    with Harness(tmp_path, shared=True) as harness:
        released = harness.tiers["shared"].hang()
        harness.store.put_blocks(blocks("a"))
        harness.store.put_record(record("s", ("a",)))
        harness.store.flush(record("s").key, Level.LOCAL, PATIENCE_SECONDS)
        assert harness.store.durability(record("s").key) is Level.LOCAL
        with pytest.raises(UnavailableError, match="not written in"):
            harness.store.flush(record("s").key, Level.SHARED, 0.05)
        released.set()
        harness.store.flush(record("s").key, Level.SHARED, PATIENCE_SECONDS)


def test_memory_is_bounded_while_a_tier_hangs(tmp_path: Path) -> None:
    with Harness(tmp_path, queue_bytes=20_000) as harness:
        released = harness.tiers["disk"].hang()
        accepted = [harness.store.put_blocks(blocks(i)) for i in range(50)]
        assert accepted[:5] == [True] * 5
        assert accepted[-30:] == [False] * 30
        assert harness.store.status()["disk"].queued_bytes <= 20_000
        released.set()
        assert harness.store.put_blocks(blocks("later"), wait_seconds=PATIENCE_SECONDS)


def test_a_write_that_hangs_takes_the_tier_out_of_use(tmp_path: Path) -> None:
    with Harness(tmp_path, write_timeout_seconds=0.1) as harness:
        released = harness.tiers["disk"].hang()
        assert harness.store.put_blocks(blocks("a"))
        time.sleep(0.15)
        assert not harness.store.put_blocks(blocks("b"))
        assert harness.of(TierDown)[0].operation == "write"  # type: ignore[attr-defined]
        released.set()


def test_a_full_disk_refuses_promises_and_still_serves_reads(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "ab", level=Level.LOCAL)

        def no_space(operation: str) -> None:
            if operation.startswith("put"):
                raise FullError("disk", "no space left on device")

        harness.tiers["disk"].before = no_space
        harness.store.put_blocks(blocks("c"))
        harness.store.put_record(record("s", ("c",)))
        with pytest.raises(UnavailableError):
            harness.store.flush(record("s").key, Level.LOCAL, PATIENCE_SECONDS)
        harness.tiers["disk"].heal()
        assert harness.store.status()["disk"].readable


def test_a_disk_that_others_filled_gets_room_from_our_cache(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.store.put_blocks(blocks("cache"))
        harness.store.flush_all(PATIENCE_SECONDS)
        refused: list[str] = []

        def once_full(operation: str) -> None:
            if operation == "put_blocks" and not refused:
                refused.append(operation)
                raise FullError("disk", os.strerror(28))

        harness.tiers["disk"].before = once_full
        saved(harness, "a", level=Level.LOCAL)
        assert harness.blocks_in("disk") == {block_key("a")}


def test_a_disk_that_is_dead_at_the_start_is_reported(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.tiers["disk"].die()
        assert harness.store.recover() == []
        assert [event.tier for event in harness.of(TierDown)] == ["disk"]  # type: ignore[attr-defined]


def test_a_damaged_record_is_reported_and_the_others_are_found(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "a", level=Level.LOCAL)
        saved(harness, "b", level=Level.LOCAL)
    file = tmp_path / "disk" / "records" / TENANT / f"{digest('a')}.record"
    file.write_bytes(file.read_bytes()[:-1])
    with Harness(tmp_path) as harness:
        assert harness.store.recover() == [record("b", ("b",))]
        assert [event.key for event in harness.of(ObjectDamaged)] == [record("a").key]  # type: ignore[attr-defined]
        assert not file.exists()


def test_a_removal_that_fails_is_done_when_the_tier_is_back(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "a", level=Level.LOCAL)
        harness.tiers["disk"].die()
        with pytest.raises(UnavailableError):
            harness.store.delete_record(record("a").key).result(PATIENCE_SECONDS)
        harness.tiers["disk"].heal()
        time.sleep(0.06)
        saved(harness, "b", level=Level.LOCAL)
        harness.store.flush_all(PATIENCE_SECONDS)
        assert harness.tiers["disk"].tier.list_records() == [record("b").key]
        assert harness.blocks_in("disk") == {block_key("b")}


def test_a_read_that_is_left_early_ends_its_readers(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        saved(harness, "abcd", level=Level.LOCAL)
        before = len(list(Path("/proc/self/fd").iterdir()))
        located = harness.store.locate([block_key(name) for name in "abcd"])
        parts = iter(harness.store.read(located, LAYERS, PART_BYTES))
        next(parts)
        del parts
        deadline = time.monotonic() + 2
        while len(list(Path("/proc/self/fd").iterdir())) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
