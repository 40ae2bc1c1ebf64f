"""Blocks and records through all tiers: written behind, promised, restored, evicted, pinned, freed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sale_prefill_server.store.base import (
    Level,
    MissingBlocksError,
    NotFoundError,
    Pin,
    PinQuotaError,
    UnavailableError,
)
from sale_prefill_server.store.events import BlocksEvicted, BlocksWritten
from tests.unit.server.store.samples import OTHER_TENANT, TENANT, block, block_key, blocks, record
from tests.unit.server.store.stores import BLOCK_BYTES, PATIENCE_SECONDS, Harness, read_all, true_parts


def save(harness: Harness, name: str, *block_names: object, level: Level = Level.LOCAL, pin: Pin = Pin.NONE) -> None:
    harness.store.put_blocks(blocks(*block_names), level=level)
    harness.store.put_record(record(name, block_names, pin=pin), level=level)
    harness.store.flush(record(name).key, level, PATIENCE_SECONDS)
    harness.store.flush_all(PATIENCE_SECONDS)


def test_what_was_put_is_read_back_layer_by_layer(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20, shared=True) as harness:
        save(harness, "s", *range(20), level=Level.SHARED)
        assert read_all(harness.store, range(20)) == true_parts(range(20))
        assert harness.blocks_in("host") == harness.blocks_in("disk") == harness.blocks_in("shared")
        assert harness.store.durability(record("s").key) is Level.SHARED


def test_a_restart_finds_records_and_blocks_again(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        save(harness, "s", "a", "b")
    with Harness(tmp_path) as harness:
        assert harness.store.recover() == [record("s", ("a", "b"))]
        assert "read" not in harness.tiers["disk"].calls
        assert "open_block" not in harness.tiers["disk"].calls
        assert read_all(harness.store, "ab") == true_parts("ab")
        assert harness.store.durability(record("s").key) is Level.LOCAL
        harness.store.flush(record("s").key, Level.LOCAL, 0)


def test_the_search_ends_at_the_first_block_that_no_tier_has(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20) as harness:
        harness.store.put_blocks(blocks("a", "b", "d"))
        located = harness.store.locate([block_key(name) for name in "abcd"])
        assert located.num_blocks == 2
        assert located.blocks_by_tier == {"host": 2}


def test_nothing_is_found_under_another_tenant(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20, shared=True) as harness:
        save(harness, "s", "a", level=Level.SHARED)
        assert harness.store.locate([block_key("a", OTHER_TENANT)]).num_blocks == 0


def test_blocks_that_wait_to_be_written_are_readable_already(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        released = harness.tiers["disk"].hang()
        harness.store.put_blocks(blocks("a", "b"))
        assert harness.store.locate([block_key("a"), block_key("b")]).num_blocks == 2
        assert read_all(harness.store, "ab") == true_parts("ab")
        released.set()


def test_blocks_for_memory_only_reach_no_disk(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20) as harness:
        harness.store.put_blocks(blocks("a"), level=Level.MEMORY)
        harness.store.flush_all(PATIENCE_SECONDS)
        assert (harness.blocks_in("host"), harness.blocks_in("disk")) == ({block_key("a")}, set())


def test_blocks_for_memory_only_go_nowhere_where_there_is_none(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.store.put_blocks(blocks("a"), level=Level.MEMORY)
        harness.store.flush_all(PATIENCE_SECONDS)
        assert harness.blocks_in("disk") == set()


def test_a_record_for_memory_only_pins_its_blocks_and_is_written_nowhere(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2 * BLOCK_BYTES) as harness:
        harness.store.put_blocks(blocks("a"), level=Level.MEMORY)
        harness.store.put_record(record("s", ("a",), pin=Pin.HARD), level=Level.MEMORY)
        for name in "bcd":
            harness.store.put_blocks(blocks(name), level=Level.MEMORY)
        assert harness.blocks_in("host") == {block_key("a"), block_key("d")}
        assert harness.tiers["disk"].tier.list_records() == []
        harness.store.delete_record(record("s").key).result(PATIENCE_SECONDS)
        assert harness.blocks_in("host") == {block_key("d")}


def test_a_local_promise_is_kept_by_a_shared_store_where_there_is_no_disk(tmp_path: Path) -> None:
    with Harness(tmp_path, disk=False, shared=True) as harness:
        save(harness, "s", "a", level=Level.LOCAL)
        assert harness.blocks_in("shared") == {block_key("a")}


def test_a_promise_that_no_tier_can_keep_is_refused(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.store.put_record(record("s"))
        with pytest.raises(UnavailableError, match="as durably as SHARED"):
            harness.store.flush(record("s").key, Level.SHARED, PATIENCE_SECONDS)
        with pytest.raises(UnavailableError, match="no such record"):
            harness.store.flush(record("t").key, Level.LOCAL, PATIENCE_SECONDS)


def test_equal_blocks_are_written_once(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20, shared=True) as harness:
        save(harness, "s", "a", "b", level=Level.SHARED)
        save(harness, "t", "a", "b", "c", level=Level.SHARED)
        written = [(event.tier, event.num_blocks) for event in harness.of(BlocksWritten)]  # type: ignore[attr-defined]
        assert sorted(written) == [(tier, n) for tier in ("disk", "host", "shared") for n in (1, 2)]


def test_a_record_whose_blocks_are_nowhere_is_not_acknowledged(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.store.put_blocks(blocks("a"))
        harness.store.put_record(record("s", ("a", "b")))
        with pytest.raises(MissingBlocksError) as caught:
            harness.store.flush(record("s").key, Level.LOCAL, PATIENCE_SECONDS)
        assert caught.value.keys == [block_key("b")]
        assert harness.tiers["disk"].tier.list_records() == []
        save(harness, "s", "a", "b")


def test_a_record_brings_blocks_that_only_another_tier_has(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20) as harness:
        harness.store.put_blocks(blocks("a"), level=Level.MEMORY)
        harness.store.put_record(record("s", ("a",)))
        harness.store.flush(record("s").key, Level.LOCAL, PATIENCE_SECONDS)
        assert harness.blocks_in("disk") == {block_key("a")}


def test_the_least_recently_used_block_goes_first(tmp_path: Path) -> None:
    with Harness(tmp_path, disk=False, host_bytes=3 * BLOCK_BYTES) as harness:
        for name in "abc":
            harness.store.put_blocks(blocks(name))
        harness.store.locate([block_key("a")])
        harness.store.put_blocks(blocks("d"))
        assert harness.blocks_in("host") == {block_key(name) for name in "acd"}


def test_of_a_chain_the_end_goes_first(tmp_path: Path) -> None:
    with Harness(tmp_path, disk=False, host_bytes=4 * BLOCK_BYTES) as harness:
        harness.store.put_blocks(blocks(*"abcd"))
        harness.store.put_blocks(blocks("x"))
        assert harness.store.locate([block_key(name) for name in "abcd"]).num_blocks == 3


def test_blocks_go_in_the_order_of_what_they_are_kept_for(tmp_path: Path) -> None:
    with Harness(tmp_path, disk_bytes=4 * (BLOCK_BYTES + 300)) as harness:
        save(harness, "hard", "h", pin=Pin.HARD)
        save(harness, "soft", "s", pin=Pin.SOFT)
        save(harness, "plain", "p")
        harness.store.put_blocks(blocks("cache"))
        harness.store.flush_all(PATIENCE_SECONDS)
        gone = []
        for new in ("1", "2", "3"):
            before = harness.blocks_in("disk") if new != "1" else {block_key(n) for n in ("h", "s", "p", "cache")}
            save(harness, new, new, pin=Pin.HARD)
            gone.append(before - harness.blocks_in("disk"))
        assert gone == [{block_key("cache")}, {block_key("p")}, {block_key("s")}]
        assert [event.needed_blocks for event in harness.of(BlocksEvicted)] == [0, 1, 1]  # type: ignore[attr-defined]
        harness.store.put_blocks(blocks("4"))
        harness.store.put_record(record("4", ("4",)))
        with pytest.raises(UnavailableError):
            harness.store.flush(record("4").key, Level.LOCAL, PATIENCE_SECONDS)
        assert {block_key(name) for name in ("h", "1", "2", "3")} == harness.blocks_in("disk")


def test_pins_and_order_survive_a_restart(tmp_path: Path) -> None:
    with Harness(tmp_path, disk_bytes=2 * (BLOCK_BYTES + 300)) as harness:
        save(harness, "hard", "h", pin=Pin.HARD)
        save(harness, "plain", "p")
    with Harness(tmp_path, disk_bytes=2 * (BLOCK_BYTES + 300)) as harness:
        harness.store.recover()
        save(harness, "new", "n")
        assert harness.blocks_in("disk") == {block_key("h"), block_key("n")}


def test_hard_pins_count_against_the_tenants_quota(tmp_path: Path) -> None:
    with Harness(tmp_path, quota_bytes=2 * BLOCK_BYTES) as harness:
        save(harness, "s", "a", "b", pin=Pin.HARD)
        save(harness, "t", "a", pin=Pin.HARD)  # equal blocks count once
        assert harness.store.pinned_bytes(TENANT) == 2 * BLOCK_BYTES
        harness.store.put_blocks(blocks("c"))
        with pytest.raises(PinQuotaError) as caught:
            harness.store.put_record(record("u", ("c",), pin=Pin.HARD))
        assert (caught.value.needed_bytes, caught.value.quota_bytes) == (3 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        other = record("s", ("a",), tenant=OTHER_TENANT, pin=Pin.HARD)
        harness.store.put_blocks([block("a", tenant=OTHER_TENANT)])
        harness.store.put_record(other)
        save(harness, "s", "a", "b", pin=Pin.SOFT)
        save(harness, "u", "c", pin=Pin.HARD)
        for name in ("t", "u"):
            harness.store.delete_record(record(name).key)
        assert harness.store.pinned_bytes(TENANT) == 0


def test_deleting_a_record_frees_the_blocks_that_no_other_needs(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20) as harness:
        harness.store.put_blocks(blocks("cache"))
        save(harness, "s", "a", "b")
        save(harness, "t", "a", "c")
        harness.store.delete_record(record("s").key).result(PATIENCE_SECONDS)
        assert harness.blocks_in("disk") == harness.blocks_in("host") == {block_key(n) for n in ("a", "c", "cache")}
        harness.store.delete_record(record("t").key, keep_blocks=True).result(PATIENCE_SECONDS)
        assert harness.blocks_in("disk") == {block_key(n) for n in ("a", "c", "cache")}
        assert harness.store.records() == harness.tiers["disk"].tier.list_records() == []
        assert harness.store.durability(record("s").key) is None
        with pytest.raises(NotFoundError):
            harness.store.get_record(record("s").key)


def test_a_deleted_record_leaves_the_shared_tiers_blocks_to_other_servers(tmp_path: Path) -> None:
    with Harness(tmp_path, shared=True) as harness:
        save(harness, "s", "a", level=Level.SHARED)
        harness.store.delete_record(record("s").key).result(PATIENCE_SECONDS)
        assert (harness.blocks_in("disk"), harness.blocks_in("shared")) == (set(), {block_key("a")})


def test_another_machine_restores_from_the_shared_tier_and_keeps_a_copy(tmp_path: Path) -> None:
    with Harness(tmp_path / "one", shared=True) as harness:
        save(harness, "s", "a", "b", level=Level.SHARED)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "shared").symlink_to(tmp_path / "one" / "shared")
    with Harness(tmp_path / "two", host_bytes=2**20, shared=True) as harness:
        assert harness.store.recover() == []
        assert harness.store.get_record(record("s").key) == record("s", ("a", "b"))
        assert harness.store.locate([block_key("a")], use_shared=False).num_blocks == 0
        assert read_all(harness.store, "ab") == true_parts("ab")
        harness.store._promotion.close(PATIENCE_SECONDS)
        harness.store.flush_all(PATIENCE_SECONDS)
        assert harness.blocks_in("host") == harness.blocks_in("disk") == {block_key("a"), block_key("b")}
        assert read_all(harness.store, "ab") == true_parts("ab")


def test_what_was_read_from_disk_is_in_memory_the_next_time(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        save(harness, "s", "a", "b")
    with Harness(tmp_path, host_bytes=2**20) as harness:
        harness.store.recover()
        assert harness.store.locate([block_key("a")]).blocks_by_tier == {"disk": 1}
        read_all(harness.store, "ab")
        harness.store._promotion.close(PATIENCE_SECONDS)
        assert harness.store.locate([block_key("a")]).blocks_by_tier == {"host": 1}
        assert read_all(harness.store, "ab") == true_parts("ab")


def test_status_says_how_each_tier_stands(tmp_path: Path) -> None:
    with Harness(tmp_path, host_bytes=2**20, quota_bytes=2**20) as harness:
        save(harness, "s", "a", pin=Pin.HARD)
        status = harness.store.status()
        assert list(status) == ["host", "disk"]
        assert (status["host"].used_bytes, status["host"].budget_bytes) == (BLOCK_BYTES, 2**20)
        assert (status["disk"].num_blocks, status["disk"].queued_bytes, status["disk"].level) == (1, 0, Level.LOCAL)
        assert status["disk"].pinned_bytes == BLOCK_BYTES
        assert status["disk"].readable
        assert status["disk"].writable


def test_closing_writes_what_was_asked_for(tmp_path: Path) -> None:
    with Harness(tmp_path) as harness:
        harness.store.put_blocks(blocks(*range(30)))
        harness.store.put_record(record("s", tuple(range(30))))
    with Harness(tmp_path) as harness:
        assert harness.store.recover() == [record("s", tuple(range(30)))]
        assert harness.store.locate([block_key(i) for i in range(30)]).num_blocks == 30
