"""A tier that does what a test says before it does its work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from sale_prefill_server.store.base import (
    Block,
    BlockEntry,
    BlockKey,
    BlockReader,
    Buffer,
    Level,
    Record,
    RecordKey,
    Tier,
    UnavailableError,
)


class FaultyTier(Tier):
    """Wraps a tier. `before` is called with the name of each operation: it may wait, or raise."""

    def __init__(self, tier: Tier, *, level: Level | None = None, name: str | None = None) -> None:
        self.tier = tier
        self.name = name or tier.name
        self.level = level or tier.level
        self.before: Callable[[str], None] = lambda operation: None
        self.calls: list[str] = []

    def die(self) -> None:
        """Every operation fails from now on."""

        def fail(operation: str) -> None:
            raise UnavailableError(self.name, "no route to host")

        self.before = fail

    def hang(self) -> threading.Event:
        """Every operation waits for the event that is returned, ten seconds at most."""
        released = threading.Event()
        self.before = lambda operation: released.wait(10) and None
        return released

    def heal(self) -> None:
        """Works again."""
        self.before = lambda operation: None

    def _enter(self, operation: str) -> None:
        self.calls.append(operation)
        self.before(operation)

    def put_blocks(self, blocks: Sequence[Block]) -> None:
        self._enter("put_blocks")
        self.tier.put_blocks(blocks)

    def open_block(self, key: BlockKey) -> BlockReader:
        self._enter("open_block")
        return _FaultyReader(self, self.tier.open_block(key))

    def find_blocks(self, keys: Iterable[BlockKey]) -> dict[BlockKey, BlockEntry]:
        self._enter("find_blocks")
        return self.tier.find_blocks(keys)

    def delete_blocks(self, keys: Iterable[BlockKey]) -> None:
        self._enter("delete_blocks")
        self.tier.delete_blocks(keys)

    def list_blocks(self) -> Iterator[tuple[BlockKey, BlockEntry]]:
        self._enter("list_blocks")
        return self.tier.list_blocks()

    def put_record(self, record: Record) -> None:
        self._enter("put_record")
        self.tier.put_record(record)

    def get_record(self, key: RecordKey) -> Record:
        self._enter("get_record")
        return self.tier.get_record(key)

    def delete_record(self, key: RecordKey) -> None:
        self._enter("delete_record")
        self.tier.delete_record(key)

    def list_records(self) -> list[RecordKey]:
        self._enter("list_records")
        return self.tier.list_records()

    def close(self) -> None:
        self.tier.close()


class _FaultyReader(BlockReader):
    def __init__(self, tier: FaultyTier, reader: BlockReader) -> None:
        self.key = reader.key
        self.num_parts = reader.num_parts
        self.part_bytes = reader.part_bytes
        self._tier = tier
        self._reader = reader

    def read(self, first_part: int, into: Sequence[Buffer]) -> None:
        self._tier._enter("read")
        self._reader.read(first_part, into)

    def close(self) -> None:
        self._reader.close()
