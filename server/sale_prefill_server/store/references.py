"""Which records need which blocks, and what tenants have pinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sale_prefill_server.store.base import BlockKey, Pin, PinQuotaError, Record, RecordKey
from sale_prefill_server.store.index import Rank

_RANKS = {Pin.NONE: Rank.NEEDED, Pin.SOFT: Rank.SOFT, Pin.HARD: Rank.HARD}


class References:
    """Counts, for each block, the records that need it, by pin. Not thread-safe.

    Args:
        size_of: bytes of a block, for the quota; 0 where nobody knows.
        quota_bytes: most that hard pins of one tenant may take, equal blocks counted once; None: no limit.
    """

    def __init__(self, size_of: Callable[[BlockKey], int], quota_bytes: int | None) -> None:
        self._size_of = size_of
        self._quota_bytes = quota_bytes
        self._records: dict[RecordKey, Record] = {}
        self._counts: dict[BlockKey, list[int]] = {}
        self._hard_bytes: dict[BlockKey, int] = {}
        self._pinned_bytes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._records

    def keys(self) -> list[RecordKey]:
        """Records that are known."""
        return list(self._records)

    def rank(self, key: BlockKey) -> Rank:
        """What a block is kept for: the most that a record asks."""
        counts = self._counts.get(key.lossless)
        if counts is None:
            return Rank.CACHE
        return next(_RANKS[pin] for pin in (Pin.HARD, Pin.SOFT, Pin.NONE) if counts[pin])

    def pinned_bytes(self, tenant: str) -> int:
        """Bytes of the tenant's hard-pinned blocks."""
        return self._pinned_bytes.get(tenant, 0)

    def add(self, record: Record, *, within_quota: bool = True) -> set[BlockKey]:
        """Counts a record, instead of an older one of its key. Returns blocks whose rank may have changed.

        Raises:
            PinQuotaError: hard pins over the quota; nothing has changed then.
        """
        if within_quota and record.pin is Pin.HARD and self._quota_bytes is not None:
            self._check_quota(record)
        old = self._records.get(record.key)
        keys = set(record.block_keys)
        for key in keys:
            self._count(key, record.pin, 1)
        self._records[record.key] = replace(record, payload=b"")
        if old is not None:
            keys |= self._forget(old)
        return keys

    def remove(self, key: RecordKey) -> set[BlockKey]:
        """Forgets a record. Returns the blocks that it needed."""
        record = self._records.pop(key, None)
        return set() if record is None else self._forget(record)

    def is_needed(self, key: BlockKey) -> bool:
        """Whether any record needs the block."""
        return key.lossless in self._counts

    def _check_quota(self, record: Record) -> None:
        assert self._quota_bytes is not None
        old = self._records.get(record.key)
        leaving = set(old.block_keys) if old is not None and old.pin is Pin.HARD else set()
        asked = set(record.block_keys)
        freed = sum(self._hard_bytes[key] for key in leaving - asked if self._counts[key][Pin.HARD] == 1)
        added = sum(self._size_of(key) for key in asked if key not in self._hard_bytes)
        needed = self.pinned_bytes(record.key.tenant) - freed + added
        if needed > self._quota_bytes:
            raise PinQuotaError(needed, self._quota_bytes)

    def _forget(self, record: Record) -> set[BlockKey]:
        keys = set(record.block_keys)
        for key in keys:
            self._count(key, record.pin, -1)
        return keys

    def _count(self, key: BlockKey, pin: Pin, change: int) -> None:
        counts = self._counts.setdefault(key, [0] * len(Pin))
        counts[pin] += change
        if pin is Pin.HARD:
            self._count_pinned(key, counts[Pin.HARD])
        if not any(counts):
            del self._counts[key]

    def _count_pinned(self, key: BlockKey, holders: int) -> None:
        if holders and key not in self._hard_bytes:
            self._hard_bytes[key] = self._size_of(key)
            self._pinned_bytes[key.tenant] = self.pinned_bytes(key.tenant) + self._hard_bytes[key]
        elif not holders:
            left = self.pinned_bytes(key.tenant) - self._hard_bytes.pop(key, 0)
            self._pinned_bytes[key.tenant] = left
            if not left:
                del self._pinned_bytes[key.tenant]
