"""Writes to one tier in the background, in the order in which things were asked."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sale_prefill_server.store.base import (
    Block,
    BlockKey,
    MissingBlocksError,
    Record,
    RecordKey,
    StoreError,
    UnavailableError,
)
from sale_prefill_server.store.events import WriteFailed
from sale_prefill_server.store.slot import TierSlot

_OUT_OF_USE = "out of use after a failure"
#: Bytes of blocks that are written and synced together.
GROUP_BYTES = 64 * 2**20

Done = Callable[[StoreError | None], None]
#: Finds blocks in other tiers: those that it could.
Fetch = Callable[[Sequence[BlockKey], TierSlot], list[Block]]


@dataclass(frozen=True)
class _Blocks:
    blocks: list[Block]
    lossless: bool
    num_bytes: int


@dataclass(frozen=True)
class _PutRecord:
    record: Record
    done: Done


@dataclass(frozen=True)
class _DeleteRecord:
    key: RecordKey
    freed: Callable[[], list[BlockKey]]
    done: Done


class TierWriter:
    """One thread, and a queue of at most `queue_bytes` of blocks.

    Args:
        slot: the tier.
        fetch: brings blocks that a record needs and this tier lacks.
    """

    def __init__(self, slot: TierSlot, fetch: Fetch) -> None:
        self._slot = slot
        self._fetch = fetch
        self._items: deque[_Blocks | _PutRecord | _DeleteRecord] = deque()
        self._owed: list[_DeleteRecord] = []
        self._changed = threading.Condition()
        self._busy_since: float | None = None
        self._closing = False
        self.queued_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"kv-{slot.name}-write", daemon=True)
        self._thread.start()

    def put_blocks(self, blocks: Sequence[Block], *, lossless: bool, wait_seconds: float) -> bool:
        """Asks for blocks to be written. Returns False where the tier is out of use or the queue stays full."""
        num_bytes = sum(block.size_bytes for block in blocks)
        refusal = self._refusal()
        if refusal is None:
            with self._changed:
                if self._changed.wait_for(lambda: self._has_room(num_bytes), wait_seconds):
                    self.queued_bytes += num_bytes
                    with self._slot.lock:
                        self._slot.waiting.update((block.key, block) for block in blocks)
                    self._items.append(_Blocks(list(blocks), lossless, num_bytes))
                    self._changed.notify_all()
                    return True
            refusal = f"{self.queued_bytes} bytes wait to be written already"
        self._slot.observer(WriteFailed(self._slot.name, len(blocks), refusal))
        return False

    def put_record(self, record: Record, done: Done) -> None:
        """Asks for a record to be written, after all that was asked before. `done` is told, in the writing thread."""
        refusal = self._refusal()
        if refusal is not None:
            done(UnavailableError(self._slot.name, refusal))
            return
        self._append(_PutRecord(record, done))

    def delete_record(self, key: RecordKey, freed: Callable[[], list[BlockKey]], done: Done) -> None:
        """Asks for a record to be removed, and then the blocks that `freed` says by then."""
        self._append(_DeleteRecord(key, freed, done))

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing is left to write."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._items and self._busy_since is None, timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Writes what was asked for and ends. Returns False where that takes longer; the rest is lost then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _append(self, item: _PutRecord | _DeleteRecord) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        return not self.queued_bytes or self.queued_bytes + num_bytes <= self._slot.settings.queue_bytes

    def _refusal(self) -> str | None:
        limit = self._slot.settings.write_timeout_seconds
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > limit:
            self._slot.writes.failed(f"a write has taken longer than {limit:g} s")
            return f"a write has taken longer than {limit:g} s"
        if self._closing:
            return "the store is closing"
        if self._slot.writes.is_due or self._items or busy_since is not None:
            return None  # what is under way will tell whether the tier works
        return _OUT_OF_USE

    # -- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closing)
                if not self._items:
                    return
                items = self._next_group()
                self._busy_since = time.monotonic()
            try:
                self._write(items)
            finally:
                with self._changed:
                    self._busy_since = None
                    self.queued_bytes -= sum(item.num_bytes for item in items if isinstance(item, _Blocks))
                    self._changed.notify_all()

    def _next_group(self) -> list[_Blocks | _PutRecord | _DeleteRecord]:
        """Blocks that go together, or one record."""
        group = [self._items.popleft()]
        first = group[0]
        if isinstance(first, _Blocks):
            num_bytes = first.num_bytes
            while self._items and isinstance(following := self._items[0], _Blocks):
                num_bytes += following.num_bytes
                if following.lossless != first.lossless or num_bytes > GROUP_BYTES:
                    break
                group.append(self._items.popleft())
        return group

    def _write(self, items: Sequence[_Blocks | _PutRecord | _DeleteRecord]) -> None:
        first = items[0]
        error: StoreError | None = None
        blocks: list[Block] = []
        try:
            if isinstance(first, _Blocks):
                blocks = [block for item in items if isinstance(item, _Blocks) for block in item.blocks]
            if not self._slot.writes.allows():
                raise UnavailableError(self._slot.name, _OUT_OF_USE)
            if isinstance(first, _Blocks):
                self._slot.store(blocks, lossless=first.lossless)
            elif isinstance(first, _PutRecord):
                self._write_record(first.record)
            else:
                self._delete_record(first)
        except StoreError as failure:
            error = failure
        except Exception as failure:  # the thread must go on; whoever waits is told
            error = UnavailableError(self._slot.name, f"{type(failure).__name__}: {failure}")
        if blocks:
            with self._slot.lock:
                for block in blocks:
                    if self._slot.waiting.get(block.key) is block:
                        del self._slot.waiting[block.key]
        if error is not None:
            self._slot.observer(WriteFailed(self._slot.name, len(blocks), str(error)))
        self._remember_deletions(first, failed=error is not None)
        if not isinstance(first, _Blocks):
            first.done(error)

    def _remember_deletions(self, item: _Blocks | _PutRecord | _DeleteRecord, *, failed: bool) -> None:
        """What could not be removed is tried again once the tier works."""
        with self._changed:
            if failed and isinstance(item, _DeleteRecord):
                self._owed.append(replace(item, done=_tell_nobody))
            elif not failed:
                self._items.extend(self._owed)
                self._owed.clear()

    def _write_record(self, record: Record) -> None:
        slot = self._slot
        missing = slot.missing(record.block_keys, lossless=record.lossless)
        if missing:
            found = self._fetch(missing, slot)
            if len(found) < len(missing):
                there = {block.key for block in found}
                raise MissingBlocksError(slot.name, [key for key in missing if key not in there])
            slot.store(found, lossless=record.lossless)
        self._counting(lambda: slot.tier.put_record(record))

    def _delete_record(self, item: _DeleteRecord) -> None:
        slot = self._slot
        self._counting(lambda: slot.tier.delete_record(item.key))
        slot.forget_blocks(item.freed())  # after the record: no record ever lacks blocks because of a power cut

    def _counting(self, call: Callable[[], None]) -> None:
        """Runs a write that tells whether the tier works."""
        try:
            call()
        except UnavailableError as error:
            self._slot.writes.failed(error.reason)
            raise
        self._slot.writes.succeeded()


def _tell_nobody(error: StoreError | None) -> None:
    pass
