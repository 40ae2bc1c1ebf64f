"""What every tier does, whatever it keeps KV in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sale_prefill_server.store.base import Block, BlockKey, NotFoundError, Pin, Tier
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.memory import MemoryTier
from tests.unit.server.store.samples import (
    OTHER_TENANT,
    PART_BYTES,
    TENANT,
    block,
    block_key,
    blocks,
    read_whole,
    record,
)


@pytest.fixture(params=["memory", "files", "s3"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made: Tier
    if request.param == "memory":
        made = MemoryTier(2**20)
    elif request.param == "files":
        made = FileTier(tmp_path / "kv")
    else:
        made = request.getfixturevalue("bucket").tier()
    yield made
    made.close()


def test_what_was_put_is_read_back_bit_for_bit(tier: Tier) -> None:
    written = blocks("a", "b", "c")
    tier.put_blocks(written)
    for one in written:
        assert read_whole(tier, one.key) == list(one.parts)


def test_any_run_of_parts_can_be_read_alone(tier: Tier) -> None:
    written = block("a")
    tier.put_blocks([written])
    reader = tier.open_block(written.key)
    into = [bytearray(PART_BYTES) for _ in range(2)]
    reader.read(2, into)
    reader.close()
    assert [bytes(part) for part in into] == list(written.parts[2:4])
    assert (reader.num_parts, reader.part_bytes) == (6, PART_BYTES)


def test_only_what_is_there_is_found(tier: Tier) -> None:
    tier.put_blocks(blocks("a", "b"))
    found = tier.find_blocks([block_key("a"), block_key("x"), block_key("b")])
    assert set(found) == {block_key("a"), block_key("b")}
    assert all(entry.size_bytes >= 6 * PART_BYTES for entry in found.values())
    with pytest.raises(NotFoundError, match="no block"):
        tier.open_block(block_key("x"))


def test_another_tenants_equal_block_is_another_block(tier: Tier) -> None:
    tier.put_blocks([block("a")])
    assert tier.find_blocks([block_key("a", OTHER_TENANT)]) == {}


def test_a_lossy_form_is_another_block(tier: Tier) -> None:
    lossy = Block(block_key("a")._replace(codec="fp8-bfloat16-64"), [b"12", b"34"])
    tier.put_blocks([lossy])
    assert tier.find_blocks([block_key("a")]) == {}
    assert read_whole(tier, lossy.key) == [b"12", b"34"]
    assert dict(tier.list_blocks()).keys() == {lossy.key}


def test_blocks_are_listed_without_being_read_and_deleted_twice(tier: Tier) -> None:
    tier.put_blocks(blocks("a", "b"))
    assert {key for key, _ in tier.list_blocks()} == {block_key("a"), block_key("b")}
    for _ in range(2):
        tier.delete_blocks([block_key("a")])
    assert {key for key, _ in tier.list_blocks()} == {block_key("b")}


def test_a_record_is_replaced_as_a_whole(tier: Tier) -> None:
    tier.put_record(record("s", ("a", "b"), payload=b"first"))
    second = record("s", ("a",), payload=b"second" * 1000, lossless=False, pin=Pin.HARD)
    tier.put_record(second)
    assert tier.get_record(second.key) == second
    assert tier.list_records() == [second.key]


def test_records_are_deleted_twice_without_an_error(tier: Tier) -> None:
    kept, gone = record("kept"), record("gone")
    tier.put_record(kept)
    tier.put_record(gone)
    for _ in range(2):
        tier.delete_record(gone.key)
    assert tier.list_records() == [kept.key]
    with pytest.raises(NotFoundError, match="no record"):
        tier.get_record(gone.key)


@pytest.mark.parametrize(
    "key", [BlockKey("../x", "0" * 64), BlockKey(TENANT, "0" * 63), BlockKey(TENANT, "0" * 64, "../../y")]
)
def test_a_key_that_could_name_a_file_elsewhere_is_refused(tier: Tier, key: BlockKey) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        tier.put_blocks([Block(key, [b"x"])])


def test_parts_of_different_lengths_are_refused(tier: Tier) -> None:
    with pytest.raises(ValueError, match="equally long"):
        tier.put_blocks([Block(block_key("a"), [b"12", b"3"])])
