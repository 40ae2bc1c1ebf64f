"""One tier in use: what it holds, whether it works, and calls to it that nobody hangs on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sale_prefill_server.store.base import (
    Block,
    BlockKey,
    BlockReader,
    Buffer,
    CorruptError,
    FullError,
    Level,
    StoreError,
    Tier,
    UnavailableError,
)
from sale_prefill_server.store.compression import Codec, compressed
from sale_prefill_server.store.events import BlocksEvicted, BlocksWritten, ObjectDamaged, StoreObserver
from sale_prefill_server.store.health import FIRST_BACKOFF_SECONDS, CircuitBreaker
from sale_prefill_server.store.index import BlockIndex, Rank, Victim
from sale_prefill_server.store.memory import MemoryReader
from sale_prefill_server.store.workers import Workers

Result = TypeVar("Result")

#: In a tier that others clean up too, a block that no record needs lives at least this long after it was written. One
#: older than half of it is written again before a record relies on it.
SHARED_GRACE_SECONDS = 86400.0


@dataclass(frozen=True)
class TierSettings:
    """A tier, and how it is used.

    `budget_bytes` bounds its blocks (None: no bound; a shared tier has none here, see `sweep`). `codec` makes what is
    written to it smaller with a loss, except blocks that must stay as they are. A read without progress for
    `read_timeout_seconds`, or a write that takes longer than `write_timeout_seconds`, takes the tier out of use for
    `backoff_seconds` and more. `queue_bytes` may wait to be written.
    """

    tier: Tier
    budget_bytes: int | None = None
    codec: Codec | None = None
    read_threads: int = 4
    read_timeout_seconds: float = 5.0
    write_timeout_seconds: float = 60.0
    backoff_seconds: float = FIRST_BACKOFF_SECONDS
    queue_bytes: int = 256 * 2**20


class TierSlot:
    """A tier with its index, its health and its reader threads. The index is guarded by the store's `lock`.

    A shared tier has no index: what others write and remove is known to the tier alone.
    """

    def __init__(
        self,
        settings: TierSettings,
        lock: threading.Lock,
        rank_of: Callable[[BlockKey], Rank],
        observer: StoreObserver,
    ) -> None:
        self.settings = settings
        self.tier = settings.tier
        self.name = settings.tier.name
        self.level = settings.tier.level
        self.is_shared = settings.tier.is_shared
        self.is_own_memory = self.level is Level.MEMORY and not self.is_shared
        self.keeps_records = self.level is not Level.MEMORY
        self.observer = observer
        self.lock = lock
        self.index = BlockIndex(rank_of)
        self.waiting: dict[BlockKey, Block] = {}
        self.reads = CircuitBreaker(self.name, "read", observer, first_backoff_seconds=settings.backoff_seconds)
        self.writes = CircuitBreaker(self.name, "write", observer, first_backoff_seconds=settings.backoff_seconds)
        self.workers = Workers(f"kv-{self.name}-read", settings.read_threads)

    # -- what is there

    def load(self) -> None:
        """Fills the index from the tier's listing, oldest first; reads no block."""
        if self.is_shared:
            return
        listed = sorted(self.tier.list_blocks(), key=lambda item: item[1].modified_seconds)
        with self.lock:
            for key, entry in listed:
                self.index.add(key, entry.size_bytes)

    def find(self, keys: Sequence[BlockKey], *, lossless: bool) -> dict[BlockKey, BlockKey]:
        """Which of the blocks are there or wait to be written: the key asked for, and the one to read.

        Raises:
            UnavailableError: a shared tier cannot tell now.
        """
        variants = [""] if lossless or self.settings.codec is None else ["", self.settings.codec.name]
        wanted = [key._replace(codec=codec) for codec in reversed(variants) for key in keys]
        with self.lock:
            present = {key for key in wanted if key in self.waiting or key in self.index}
            for key in reversed(wanted):  # of a chain, the end goes first
                self.index.touch(key)
        if self.is_shared:
            asked = [key for key in wanted if key not in present]
            present.update(self.call(lambda: self.tier.find_blocks(asked), self.settings.read_timeout_seconds))
        return {key.lossless: key for key in wanted if key in present}

    # -- reading

    def call(self, function: Callable[[], Result], timeout_seconds: float) -> Result:
        """Runs a call to the tier in one of its threads.

        Raises:
            UnavailableError: it failed, took too long, or the tier is out of use.
            NotFoundError, CorruptError
        """
        if not self.reads.allows():
            raise UnavailableError(self.name, "out of use after a failure")
        future = self.workers.submit(function)
        try:
            result = future.result(timeout_seconds)
        except TimeoutError:
            future.cancel()
            error = UnavailableError(self.name, f"no answer in {timeout_seconds:g} s")
            self.failed_read(error)
            raise error from None
        except StoreError as error:
            self.failed_read(error)
            raise
        self.reads.succeeded()
        return result

    def failed_read(self, error: StoreError, key: BlockKey | None = None) -> None:
        """Draws the conclusions from a failed read, of the block `key` if it was one."""
        if isinstance(error, CorruptError):
            self.observer(ObjectDamaged(self.name, error.key, error.reason))
            key = error.key if isinstance(error.key, BlockKey) else None
        if isinstance(error, UnavailableError):
            self.reads.failed(error.reason)
        elif key is not None:
            with self.lock:
                self.index.remove(key)

    def open_block(self, key: BlockKey) -> BlockReader:
        """A reader, of what waits to be written too."""
        with self.lock:
            waiting = self.waiting.get(key)
        return MemoryReader(waiting) if waiting is not None else self.tier.open_block(key)

    def read_block(self, key: BlockKey) -> Block:
        """A whole block, in the form that `key` says. Runs in the caller's thread; see `call`."""
        reader = self.open_block(key)
        try:
            parts = [bytearray(reader.part_bytes) for _ in range(reader.num_parts)]
            reader.read(0, parts)
        finally:
            reader.close()
        return Block(key, parts)

    def read_parts(self, reader: BlockReader, first_part: int, into: Sequence[Buffer]) -> None:
        """Parts as they were before the tier's codec.

        Raises:
            CorruptError: also where the parts are not as long as `into` asks.
        """
        codec = self.settings.codec if reader.key.codec else None
        sizes = {len(buffer) for buffer in into}
        if codec is None:
            if sizes != {reader.part_bytes} or first_part + len(into) > reader.num_parts:
                raise CorruptError(self.name, reader.key, f"{reader.num_parts} parts of {reader.part_bytes} bytes")
            reader.read(first_part, into)
            return
        encoded = [bytearray(reader.part_bytes) for _ in into]
        reader.read(first_part, encoded)
        for small, whole in zip(encoded, into, strict=True):
            try:
                codec.decode(small, whole)
            except ValueError as error:
                raise CorruptError(self.name, reader.key, str(error)) from error

    # -- writing: one thread at a time

    def store(self, blocks: Sequence[Block], *, lossless: bool) -> None:
        """Writes those of the blocks that are not there, making room.

        Raises:
            FullError, UnavailableError
        """
        started = time.monotonic()
        fresh = self._absent(blocks, lossless=lossless)
        if not fresh:
            return
        codec = None if lossless else self.settings.codec
        if codec is not None:
            fresh = [compressed(block, codec) for block in fresh]
        num_bytes = sum(block.size_bytes for block in fresh)
        self._make_room(num_bytes)
        self._put(fresh, num_bytes)
        if not self.is_shared:
            with self.lock:
                for block in reversed(fresh):
                    self.index.add(block.key, block.size_bytes)
        name = codec.name if codec is not None else ""
        self.observer(BlocksWritten(self.name, len(fresh), num_bytes, time.monotonic() - started, name))

    def missing(self, keys: Sequence[BlockKey], *, lossless: bool) -> list[BlockKey]:
        """Which blocks have not been written in a form that serves; for the thread that writes."""
        return [block.key for block in self._absent([Block(key, ()) for key in keys], lossless=lossless)]

    def _absent(self, blocks: Sequence[Block], *, lossless: bool) -> list[Block]:
        codec = self.settings.codec
        variants = [""] if lossless or codec is None else ["", codec.name]
        unique = {block.key: block for block in blocks}
        keys = [key._replace(codec=codec_name) for key in unique for codec_name in variants]
        if self.is_shared:
            oldest = time.time() - SHARED_GRACE_SECONDS / 2
            found = self.tier.find_blocks(keys)
            present = {key.lossless for key, entry in found.items() if entry.modified_seconds >= oldest}
        else:
            with self.lock:
                present = {key.lossless for key in keys if key in self.index}
                for key in reversed(keys):
                    self.index.touch(key)
        return [block for key, block in unique.items() if key not in present]

    def _put(self, blocks: Sequence[Block], num_bytes: int) -> None:
        try:
            try:
                self.tier.put_blocks(blocks)
            except FullError:  # others fill the disk: our own cache gives way first
                if not self._evict(num_bytes):
                    raise
                self.tier.put_blocks(blocks)
        except UnavailableError as error:
            self.writes.failed(error.reason)
            if not self.is_shared:  # some may be there, in nobody's index
                with contextlib.suppress(StoreError):
                    self.tier.delete_blocks([block.key for block in blocks])
            raise
        self.writes.succeeded()

    def _make_room(self, num_bytes: int) -> None:
        budget = self.settings.budget_bytes
        if budget is None or self.is_shared:
            return
        excess = self.index.used_bytes + num_bytes - budget
        if excess > 0 and (num_bytes > budget or self._evict(excess) < excess):
            raise FullError(
                self.name, f"{num_bytes} bytes needed, and {budget} of budget hold {self.index.used_bytes} that stay"
            )

    def _evict(self, num_bytes: int) -> int:
        """Removes what is least worth; returns the bytes, fewer where the rest is pinned hard."""
        with self.lock:
            victims = self.index.victims(num_bytes)
            for victim in victims:
                self.index.remove(victim.key)
        if victims:
            self.tier.delete_blocks([victim.key for victim in victims])
            self.observer(_evicted(self.name, victims))
        return sum(victim.size_bytes for victim in victims)

    def forget_blocks(self, keys: Iterable[BlockKey]) -> None:
        """Removes blocks in all their forms."""
        with self.lock:
            codecs = {"", self.settings.codec.name} if self.settings.codec is not None else {""}
            held = [form for key in keys for codec in codecs if (form := key._replace(codec=codec)) in self.index]
            for form in held:
                self.index.remove(form)
        self.tier.delete_blocks(held)


def _evicted(tier: str, victims: Sequence[Victim]) -> BlocksEvicted:
    needed = sum(victim.rank is not Rank.CACHE for victim in victims)
    return BlocksEvicted(tier, len(victims), sum(victim.size_bytes for victim in victims), needed)
