"""How much memory segments may take, and how much they do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.transfer.segment_memory import SegmentTransport


@dataclass(frozen=True)
class SegmentLimits:
    """How much there may be, and for how long.

    Args:
        capacity_bytes: all segments of a transport together; a transport that is not here is not offered.
        segments_per_tenant: open ones of one tenant.
        connect_seconds: a segment whose owner does not connect to it goes after this.
        idle_seconds: one that no stream uses goes after this, connected or not.
    """

    capacity_bytes: Mapping[SegmentTransport, int]
    segments_per_tenant: int = 16
    connect_seconds: float = 30.0
    idle_seconds: float = 300.0


class SegmentBudget:
    """Counts bytes by transport and segments by tenant. Thread-safe.

    What a caller keeps mapped of a segment that was closed is the caller's and not counted.
    """

    def __init__(self, limits: SegmentLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._used_bytes: Counter[SegmentTransport] = Counter()
        self._open_by_tenant: Counter[str] = Counter()

    def used_bytes(self, transport: SegmentTransport | None = None) -> int:
        """Bytes taken, of one transport or of all."""
        with self._lock:
            return self._used_bytes.total() if transport is None else self._used_bytes[transport]

    def open_segments(self) -> Mapping[str, int]:
        """Segments by tenant, of those that have some."""
        with self._lock:
            return dict(self._open_by_tenant)

    def take(self, tenant: str, transport: SegmentTransport, size_bytes: int) -> None:
        """Counts one more segment.

        Raises:
            PrefillError: KV_CAPACITY, too many bytes or too many segments.
        """
        limit = self._limits.segments_per_tenant
        with self._lock:
            free_bytes = self._limits.capacity_bytes[transport] - self._used_bytes[transport]
            if size_bytes > free_bytes:
                raise no_capacity(
                    f"a segment of {size_bytes} bytes: {free_bytes} of {transport} memory are free; ask for less, "
                    "close another transfer, or move the bytes through gRPC",
                    size_bytes,
                    free_bytes,
                )
            if self._open_by_tenant[tenant] >= limit:
                raise no_capacity(
                    f"{limit} transfers are open, the most that a tenant may have: close one", size_bytes, free_bytes
                )
            self._open_by_tenant[tenant] += 1
            self._used_bytes[transport] += size_bytes

    def give_back(self, tenant: str, transport: SegmentTransport, size_bytes: int) -> None:
        """Counts one fewer."""
        with self._lock:
            self._used_bytes[transport] -= size_bytes
            self._open_by_tenant[tenant] -= 1
            if not self._open_by_tenant[tenant]:
                del self._open_by_tenant[tenant]


def no_capacity(message: str, needed_bytes: int, free_bytes: int) -> PrefillError:
    """KV_CAPACITY with its numbers."""
    return PrefillError(
        Reason.KV_CAPACITY,
        message,
        metadata={"needed_bytes": needed_bytes, "free_bytes": free_bytes},
    )
