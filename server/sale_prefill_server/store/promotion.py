"""Copies what was read from a slow tier to the faster ones, after the read."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

from sale_prefill_server.store.base import Block, BlockKey, Level, StoreError
from sale_prefill_server.store.located import Located
from sale_prefill_server.store.slot import TierSlot
from sale_prefill_server.store.workers import Workers

#: Blocks that may wait to be copied; more are not copied.
_MOST_WAITING = 256


class Promotion:
    """Copies blocks, in one thread.

    From a local disk to memory by reading again, one at a time, since the disk's cache has them by then; from a
    shared tier to memory and disk with the bytes that were read. Lossy forms stay where they are.

    Args:
        slots: fastest first.
        put: writes blocks to a tier, or does not where it has no room.
    """

    def __init__(self, slots: Sequence[TierSlot], put: Callable[[TierSlot, Sequence[Block]], None]) -> None:
        self._memory = [slot for slot in slots if slot.is_own_memory]
        self._faster = [slot for slot in slots if not slot.is_shared]
        self._put = put
        self._workers = Workers("kv-promote", 1)
        self._waiting = 0
        self._lock = threading.Lock()

    def run(self, located: Located, assembled: Sequence[Block]) -> None:
        """Has blocks copied in the background; `assembled` are those whose bytes are there already."""
        if assembled:
            self._workers.submit(functools.partial(self._put_all, self._faster, assembled))
        if not self._memory:
            return
        for places in located.sources:
            slot, key = places[0]
            if slot.level is Level.LOCAL and not key.codec and self._take_place():
                self._workers.submit(functools.partial(self._copy, slot, key))

    def close(self, timeout_seconds: float) -> None:
        """Ends the thread."""
        self._workers.close(timeout_seconds)

    def _take_place(self) -> bool:
        with self._lock:
            if self._waiting >= _MOST_WAITING:
                return False
            self._waiting += 1
            return True

    def _copy(self, slot: TierSlot, key: BlockKey) -> None:
        try:
            block = slot.call(functools.partial(slot.read_block, key), slot.settings.read_timeout_seconds)
            self._put_all(self._memory, [block])
        except StoreError:
            pass  # whoever reads next will be told
        finally:
            with self._lock:
                self._waiting -= 1

    def _put_all(self, slots: Sequence[TierSlot], blocks: Sequence[Block]) -> None:
        for slot in slots:
            self._put(slot, blocks)
