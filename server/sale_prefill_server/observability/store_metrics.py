"""Metrics and log lines of the tiers below the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sale_prefill_server.events import Event
from sale_prefill_server.store.base import describe
from sale_prefill_server.store.events import (
    BlocksEvicted,
    BlocksRead,
    BlocksWritten,
    ObjectDamaged,
    TierDown,
    TierUp,
    WriteFailed,
)

logger = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40)
OPERATIONS = ("read", "write")


class StoreMetrics:
    """What the store's events say, as series by tier.

    Args:
        registry: where the series are.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sale_prefill_store_{name}", text, labels, registry=registry)

        self.bytes = counter("bytes", "KV bytes moved to and from tiers.", "tier", "operation")
        self.blocks = counter("blocks", "KV blocks moved to and from tiers.", "tier", "operation")
        self.seconds = Histogram(
            "sale_prefill_store_operation_duration_seconds",
            "Duration of a group of writes, or of a read of many blocks.",
            ("tier", "operation"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.damaged = counter("damaged_objects", "Objects put aside, as they differed from their checksum.", "tier")
        self.evicted = counter("evicted_blocks", "Blocks that made room; did sessions need them?", "tier", "needed")
        self.failures = counter("write_failures", "Writes that did not reach a tier.", "tier")
        self.up = Gauge(
            "sale_prefill_store_up", "0 while a tier is out of use.", ("tier", "operation"), registry=registry
        )
        self.queued_bytes = Gauge(
            "sale_prefill_store_queued_bytes", "KV bytes that wait to be written.", ("tier",), registry=registry
        )

    def start_at_zero(self, tiers: Iterable[str]) -> None:
        """Every series of every tier is there from the start."""
        for tier in tiers:
            for operation in OPERATIONS:
                self.bytes.labels(tier, operation)
                self.blocks.labels(tier, operation)
                self.seconds.labels(tier, operation)
                self.up.labels(tier, operation).set(1)
            self.damaged.labels(tier)
            self.failures.labels(tier)
            self.queued_bytes.labels(tier)
            for needed in ("true", "false"):
                self.evicted.labels(tier, needed)

    def observe(self, event: Event) -> None:
        """Counts an event of the store, passes over others."""
        if isinstance(event, BlocksWritten | BlocksRead):
            labels = (event.tier, "write" if isinstance(event, BlocksWritten) else "read")
            self.bytes.labels(*labels).inc(event.num_bytes)
            self.blocks.labels(*labels).inc(event.num_blocks)
            self.seconds.labels(*labels).observe(event.duration_seconds)
        elif isinstance(event, TierDown | TierUp):
            self.up.labels(event.tier, event.operation).set(isinstance(event, TierUp))
        elif isinstance(event, ObjectDamaged):
            self.damaged.labels(event.tier).inc()
        elif isinstance(event, BlocksEvicted):
            self.evicted.labels(event.tier, "true").inc(event.needed_blocks)
            self.evicted.labels(event.tier, "false").inc(event.num_blocks - event.needed_blocks)
        elif isinstance(event, WriteFailed):
            self.failures.labels(event.tier).inc()


_LINES: dict[type, Callable[..., str]] = {
    TierDown: lambda event: (
        f"tier {event.tier}: no {event.operation} for {event.retry_seconds:g} s: {event.reason}; KV that it would have "
        "given is computed"
    ),
    TierUp: lambda event: f"tier {event.tier}: {event.operation} works again",
    ObjectDamaged: lambda event: (
        f"tier {event.tier}: {describe(event.key)} is damaged ({event.reason}): in quarantine, and computed again"
    ),
    WriteFailed: lambda event: f"tier {event.tier}: {event.num_blocks} blocks were not written: {event.reason}",
}


def log_store_event(event: Event) -> None:
    """Says what people should know."""
    if line := _LINES.get(type(event)):
        logger.log(logging.INFO if isinstance(event, TierUp) else logging.WARNING, "%s", line(event))
