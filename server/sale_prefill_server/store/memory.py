"""The host memory tier: blocks as they were handed over, until the process ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from sale_prefill_server.store.base import (
    Block,
    BlockEntry,
    BlockKey,
    BlockReader,
    Buffer,
    FullError,
    Level,
    NotFoundError,
    Record,
    RecordKey,
    Tier,
    checked_block,
)


class MemoryTier(Tier):
    """At most `budget_bytes` of blocks. It keeps the buffers that it is given, so putting a block copies nothing.

    Bytes that never leave memory carry no checksums.
    """

    level = Level.MEMORY

    def __init__(self, budget_bytes: int, *, name: str = "host") -> None:
        self.name = name
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._blocks: dict[BlockKey, tuple[Block, float]] = {}
        self._records: dict[RecordKey, Record] = {}
        self._lock = threading.Lock()

    def put_blocks(self, blocks: Sequence[Block]) -> None:
        with self._lock:
            for block in map(checked_block, blocks):
                held = self._blocks.get(block.key)
                growth = block.size_bytes - (held[0].size_bytes if held else 0)
                if self.used_bytes + growth > self.budget_bytes:
                    raise FullError(
                        self.name, f"{growth} bytes needed, {self.budget_bytes - self.used_bytes} of the budget free"
                    )
                self._blocks[block.key] = block, time.time()
                self.used_bytes += growth

    def open_block(self, key: BlockKey) -> BlockReader:
        with self._lock:
            if key not in self._blocks:
                raise NotFoundError(self.name, key)
            return MemoryReader(self._blocks[key][0])

    def find_blocks(self, keys: Iterable[BlockKey]) -> dict[BlockKey, BlockEntry]:
        with self._lock:
            held = ((key, self._blocks.get(key)) for key in keys)
            return {key: BlockEntry(entry[0].size_bytes, entry[1]) for key, entry in held if entry}

    def delete_blocks(self, keys: Iterable[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                held = self._blocks.pop(key, None)
                if held:
                    self.used_bytes -= held[0].size_bytes

    def list_blocks(self) -> Iterator[tuple[BlockKey, BlockEntry]]:
        with self._lock:
            held = list(self._blocks.items())
        for key, (block, written) in held:
            yield key, BlockEntry(block.size_bytes, written)

    def put_record(self, record: Record) -> None:
        with self._lock:
            self._records[record.key.checked()] = record

    def get_record(self, key: RecordKey) -> Record:
        with self._lock:
            if key not in self._records:
                raise NotFoundError(self.name, key)
            return self._records[key]

    def delete_record(self, key: RecordKey) -> None:
        with self._lock:
            self._records.pop(key, None)

    def list_records(self) -> list[RecordKey]:
        with self._lock:
            return list(self._records)

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._records.clear()
            self.used_bytes = 0


class MemoryReader(BlockReader):
    """Parts of a block that is in memory."""

    def __init__(self, block: Block) -> None:
        self.key = block.key
        self.num_parts = len(block.parts)
        self.part_bytes = block.part_bytes
        self._parts = block.parts

    def read(self, first_part: int, into: Sequence[Buffer]) -> None:
        for target, part in zip(into, self._parts[first_part : first_part + len(into)], strict=True):
            memoryview(target)[:] = part

    def close(self) -> None:
        self._parts = ()
