"""What happened in the store, for whoever watches: metrics and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sale_prefill_server.store.base import BlockKey, RecordKey


@dataclass(frozen=True)
class TierDown:
    """A tier failed or was slow: no `operation` ("read" or "write") of it for `retry_seconds`."""

    tier: str
    operation: str
    reason: str
    retry_seconds: float


@dataclass(frozen=True)
class TierUp:
    """A tier that was down works again."""

    tier: str
    operation: str


@dataclass(frozen=True)
class ObjectDamaged:
    """A block or record differed from its checksum and was put aside."""

    tier: str
    key: BlockKey | RecordKey
    reason: str


@dataclass(frozen=True)
class BlocksWritten:
    """Blocks reached a tier. `num_bytes` is what they take there, in the form that `codec` names."""

    tier: str
    num_blocks: int
    num_bytes: int
    duration_seconds: float
    codec: str


@dataclass(frozen=True)
class BlocksRead:
    """A read ended, for one of the tiers that it took blocks from."""

    tier: str
    num_blocks: int
    num_bytes: int
    duration_seconds: float


@dataclass(frozen=True)
class BlocksEvicted:
    """A tier made room. Records need `needed_blocks` of those, and will compute them again."""

    tier: str
    num_blocks: int
    num_bytes: int
    needed_blocks: int


@dataclass(frozen=True)
class WriteFailed:
    """Blocks, or a record, did not reach a tier."""

    tier: str
    num_blocks: int
    reason: str


StoreEvent = TierDown | TierUp | ObjectDamaged | BlocksWritten | BlocksRead | BlocksEvicted | WriteFailed
#: Called in the thread where it happened; quick, and never raises.
StoreObserver = Callable[[StoreEvent], None]


def ignore(event: StoreEvent) -> None:
    """Watches nothing."""
