"""KV in several tiers, fastest first: the one thing that sessions and the engine talk to.

Writing: `put_blocks` hands a session's new pages over, `put_record` then says what the session is. Both return at once;
each tier takes them in that order in its own thread, so what a record promises is there before the record is. `flush`
waits for a promise. Reading: `locate` says how many leading blocks of a prompt are kept, `read` brings them layer by
layer. A tier that fails or hangs goes out of use for a while: reads fall to the next one or miss, writes are refused,
and the observer is told. Nothing here blocks for longer than its timeout; all methods may be called from any thread,
and those that read or wait do not belong on an event loop.

Blocks that some record needs outlive those that are only cache; see `Pin` for records' own order. A promise of
durability holds against crashes; against a tier's budget, only a hard pin does.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sale_prefill_server.store.acknowledgements import Acknowledgements, Countdown
from sale_prefill_server.store.base import (
    Block,
    BlockKey,
    Buffer,
    CorruptError,
    Level,
    NotFoundError,
    Record,
    RecordKey,
    StoreError,
    UnavailableError,
    checked_block,
)
from sale_prefill_server.store.events import ObjectDamaged, StoreObserver, WriteFailed, ignore
from sale_prefill_server.store.index import Rank
from sale_prefill_server.store.located import Located, Source
from sale_prefill_server.store.promotion import Promotion
from sale_prefill_server.store.reading import LayeredRead
from sale_prefill_server.store.references import References
from sale_prefill_server.store.slot import TierSettings, TierSlot
from sale_prefill_server.store.writer import TierWriter


@dataclass(frozen=True)
class TierStatus:
    """How a tier stands. A shared tier's blocks are not counted here: `num_blocks` and `used_bytes` are 0."""

    level: Level
    num_blocks: int
    used_bytes: int
    budget_bytes: int | None
    pinned_bytes: int
    queued_bytes: int
    readable: bool
    writable: bool


class TieredStore:
    """Tiers in order of speed.

    Args:
        tiers: fastest first; names differ.
        observer: told what happens, in the thread where it does.
        pin_quota_bytes: most that one tenant's hard pins may take; None: no limit.
    """

    def __init__(
        self,
        tiers: Sequence[TierSettings],
        *,
        observer: StoreObserver = ignore,
        pin_quota_bytes: int | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._observer = observer
        self._references = References(self._size_of, pin_quota_bytes)
        self._slots = [TierSlot(settings, self._lock, self._references.rank, observer) for settings in tiers]
        if len({slot.name for slot in self._slots}) < len(self._slots):
            raise ValueError(f"tiers {[slot.name for slot in self._slots]}: give each its own name")
        self._writers = {slot: TierWriter(slot, self._fetch) for slot in self._slots if not slot.is_own_memory}
        self._acknowledgements = Acknowledgements({slot.name: slot.level for slot in self._slots if slot.keeps_records})
        self._memory_lock = threading.Lock()
        self._promotion = Promotion(self._slots, self._put_fast)

    # -- starting

    def recover(self) -> list[Record]:
        """Takes stock of the local tiers and returns the records that they hold, verified; reads no block.

        A local tier that does not work is reported as down, and what it holds stays unknown to this process.

        Records and blocks of a shared tier are found when they are asked for. A block that a record needs and that is
        not there is no error here: `locate` will say so.
        """
        found: dict[RecordKey, Record] = {}
        for slot in self._slots:
            if slot.level is Level.LOCAL:
                try:
                    for record in self._records_of(slot):
                        found.setdefault(record.key, record)
                        self._acknowledgements.found(record.key, slot.name)
                    slot.load()
                except UnavailableError as error:
                    slot.failed_read(error)
        with self._lock:
            for record in found.values():
                self._rerank(self._references.add(record, within_quota=False))
        return list(found.values())

    # -- writing

    def put_blocks(
        self,
        blocks: Sequence[Block],
        *,
        level: Level = Level.SHARED,
        lossless_required: bool = True,
        wait_seconds: float = 0.0,
    ) -> bool:
        """Hands blocks over to the tiers up to `level`. Their buffers are the store's from then on.

        Args:
            lossless_required: keep them as they are even in a tier with a codec.
            wait_seconds: how long to wait where a tier's queue is full.

        Returns:
            False where a tier refused them: out of use, or its queue stayed full. Others have them all the same, and a
            record that needs them brings them from there.
        """
        accepted = True
        blocks = [checked_block(block) for block in blocks]
        for slot in self._targets(level):
            if slot in self._writers:
                writer = self._writers[slot]
                accepted &= writer.put_blocks(blocks, lossless=lossless_required, wait_seconds=wait_seconds)
            else:
                self._store_in_memory(slot, blocks, lossless=lossless_required)
        return accepted

    def put_record(self, record: Record, *, level: Level = Level.SHARED) -> None:
        """Has a record written to the durable tiers up to `level`, after what was put before it; see `flush`.

        From now on its blocks are kept as `record.pin` says, and those of an older record of the same key are not; at
        level MEMORY that is all, since no tier gets the record.

        Raises:
            PinQuotaError: nothing has changed then.
        """
        record.key.checked()
        with self._lock:
            self._rerank(self._references.add(record))
        targets = [slot for slot in self._targets(level) if slot.keeps_records]
        done = self._acknowledgements.asked(record.key, [slot.name for slot in targets])
        for slot in targets:
            self._writers[slot].put_record(record, functools.partial(done, slot.name))

    def flush(self, key: RecordKey, level: Level, timeout_seconds: float) -> None:
        """Waits until the newest record of `key` is as durable as `level` says.

        Raises:
            MissingBlocksError: put its blocks and the record again.
            UnavailableError: refused, failed or not done in time; it may still get there later.
        """
        self._acknowledgements.wait(key, level, timeout_seconds)

    def flush_all(self, timeout_seconds: float) -> None:
        """Waits until everything that was put is written or has failed.

        Raises:
            UnavailableError: a tier did not get there in time.
        """
        end = time.monotonic() + timeout_seconds
        for slot, writer in self._writers.items():
            if not writer.wait_idle(max(0.0, end - time.monotonic())):
                raise UnavailableError(slot.name, f"{writer.queued_bytes} bytes not written in {timeout_seconds:g} s")

    def durability(self, key: RecordKey) -> Level | None:
        """What the newest record of `key` survives, as far as it was acknowledged; None: nothing."""
        return self._acknowledgements.level(key)

    def delete_record(self, key: RecordKey, *, keep_blocks: bool = False) -> Future[None]:
        """Forgets a session, in the background.

        Args:
            keep_blocks: leave its blocks as cache. Else those that no other record needs go too; in a shared tier they
                go when it is swept, since other servers' records may need them.

        Returns:
            Done once no durable tier has the record; `UnavailableError` where one cannot remove it now: that is tried
            again when the tier works, and the record comes back if the process ends before.
        """
        with self._lock:
            needed = self._references.remove(key)
            self._rerank(needed)
        self._acknowledgements.forget(key)
        freed = functools.partial(self._unneeded, set() if keep_blocks else needed)
        removed = Countdown(sum(slot.keeps_records for slot in self._slots))
        for slot in self._slots:
            if slot.keeps_records:
                self._writers[slot].delete_record(key, freed if slot.level is Level.LOCAL else list, removed.count)
            elif slot.is_own_memory:
                slot.forget_blocks(freed())
        return removed.future

    # -- reading

    def locate(self, keys: Sequence[BlockKey], *, lossless_required: bool = True, use_shared: bool = True) -> Located:
        """Finds the leading blocks that some tier has; the first one that none has ends the search.

        Args:
            lossless_required: do not take lossy forms.
            use_shared: ask tiers that other servers see too, which costs a round trip.
        """
        sources: list[list[Source]] = [[] for _ in keys]
        for slot in self._slots:
            if slot.is_shared and not use_shared:
                continue
            there = self._find(slot, keys, sources, lossless=lossless_required)
            for key, places in zip(keys, sources, strict=True):
                if key in there:
                    places.append(Source(slot, there[key]))
                elif places and slot.is_shared:
                    places.append(Source(slot, key))  # not asked for: it may help where a faster tier fails
        count = next((index for index, places in enumerate(sources) if not places), len(keys))
        return Located(tuple(keys[:count]), tuple(map(tuple, sources[:count])))

    def read(
        self,
        located: Located,
        num_layers: int,
        part_bytes: int,
        *,
        first_layer: int = 0,
        allocate: Callable[[int], Buffer] = bytearray,
        deadline_seconds: float | None = None,
    ) -> LayeredRead:
        """Reads located blocks of equal parts layer by layer; see `LayeredRead`.

        What came from a slower tier is copied to the faster ones in the background.
        """
        return LayeredRead(
            located,
            range(first_layer, num_layers),
            part_bytes,
            allocate=allocate,
            deadline_seconds=deadline_seconds,
            on_complete=functools.partial(self._promotion.run, located),
        )

    def get_record(self, key: RecordKey) -> Record:
        """A record from the fastest tier that has it.

        Raises:
            NotFoundError: no tier has it, as far as tiers answer.
        """
        for slot in self._slots:
            if slot.keeps_records:
                try:
                    return slot.call(functools.partial(slot.tier.get_record, key), slot.settings.read_timeout_seconds)
                except StoreError:
                    continue
        raise NotFoundError("store", key)

    def records(self) -> list[RecordKey]:
        """Keys of the records that this process knows: recovered or put."""
        with self._lock:
            return self._references.keys()

    # -- state

    def pinned_bytes(self, tenant: str) -> int:
        """Bytes of a tenant's hard-pinned blocks."""
        with self._lock:
            return self._references.pinned_bytes(tenant)

    def status(self) -> dict[str, TierStatus]:
        """How each tier stands, by name."""
        with self._lock:
            return {slot.name: self._status(slot) for slot in self._slots}

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Writes what was asked for, ends the threads and the tiers. Calls that hang are left behind."""
        end = time.monotonic() + timeout_seconds
        self._promotion.close(max(0.0, end - time.monotonic()))
        for slot in self._slots:
            written = slot not in self._writers or self._writers[slot].close(max(0.0, end - time.monotonic()))
            slot.workers.close(max(0.0, min(1.0, end - time.monotonic())))
            if written:
                slot.tier.close()

    # -- inside

    def _targets(self, level: Level) -> list[TierSlot]:
        """Tiers up to a level, and where none of them reaches it, the first that goes beyond."""
        targets = [slot for slot in self._slots if slot.level <= level]
        if level is not Level.MEMORY and not any(slot.level is level for slot in targets):
            targets += [slot for slot in self._slots if slot.level > level][:1]
        return targets

    def _store_in_memory(self, slot: TierSlot, blocks: Sequence[Block], *, lossless: bool) -> None:
        try:
            with self._memory_lock:
                slot.store(blocks, lossless=lossless)
        except StoreError as error:
            self._observer(WriteFailed(slot.name, len(blocks), str(error)))

    def _put_fast(self, slot: TierSlot, blocks: Sequence[Block]) -> None:
        """Copies blocks to a faster tier, where that costs nobody anything."""
        if slot in self._writers:
            self._writers[slot].put_blocks(blocks, lossless=True, wait_seconds=0.0)
        else:
            self._store_in_memory(slot, blocks, lossless=True)

    def _find(
        self, slot: TierSlot, keys: Sequence[BlockKey], sources: Sequence[Sequence[Source]], *, lossless: bool
    ) -> dict[BlockKey, BlockKey]:
        if not slot.is_shared:
            return slot.find(keys, lossless=lossless) if slot.reads.allows() else {}
        asked = [key for key, places in zip(keys, sources, strict=True) if not places]
        try:
            return slot.find(asked, lossless=lossless) if asked else {}
        except StoreError:
            return {}

    def _fetch(self, keys: Sequence[BlockKey], asking: TierSlot) -> list[Block]:
        """Blocks, as they were, from any other tier; those that can be read."""
        found = []
        for key in keys:
            for slot in self._slots:
                if slot is not asking:
                    try:
                        read = functools.partial(slot.read_block, key)
                        found.append(slot.call(read, slot.settings.read_timeout_seconds))
                        break
                    except StoreError:
                        continue
        return found

    def _records_of(self, slot: TierSlot) -> Iterator[Record]:
        for key in slot.tier.list_records():
            try:
                yield slot.tier.get_record(key)
            except CorruptError as error:
                self._observer(ObjectDamaged(slot.name, key, error.reason))
            except NotFoundError:
                continue

    def _unneeded(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        with self._lock:
            return [key for key in keys if not self._references.is_needed(key)]

    def _rerank(self, keys: Iterable[BlockKey]) -> None:
        for slot in self._slots:
            codec = slot.settings.codec
            for key in keys:
                slot.index.rerank(key)
                if codec is not None:
                    slot.index.rerank(key._replace(codec=codec.name))

    def _size_of(self, key: BlockKey) -> int:
        """Bytes of a block where it is known as it was; called with the lock held."""
        for slot in self._slots:
            waiting = slot.waiting.get(key)
            size = waiting.size_bytes if waiting is not None else slot.index.size_bytes(key)
            if size is not None:
                return size
        return 0

    def _status(self, slot: TierSlot) -> TierStatus:
        return TierStatus(
            level=slot.level,
            num_blocks=len(slot.index),
            used_bytes=slot.index.used_bytes,
            budget_bytes=slot.settings.budget_bytes,
            pinned_bytes=slot.index.rank_bytes(Rank.HARD),
            queued_bytes=self._writers[slot].queued_bytes if slot in self._writers else 0,
            readable=not slot.reads.is_open,
            writable=not slot.writes.is_open,
        )
