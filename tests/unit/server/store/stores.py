"""Stores of real tiers that tests use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sale_prefill_server.store.base import BlockKey, Level
from sale_prefill_server.store.events import StoreEvent
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.memory import MemoryTier
from sale_prefill_server.store.tiers import TieredStore, TierSettings
from tests.unit.server.store.faults import FaultyTier
from tests.unit.server.store.samples import LAYERS, PART_BYTES, TENANT, block, block_key

BLOCK_BYTES = 2 * LAYERS * PART_BYTES
PATIENCE_SECONDS = 10.0


class Harness:
    """A store of host memory, disk and a shared directory, any of which may be left out; its events, its tiers."""

    def __init__(
        self,
        root: Path,
        *,
        host_bytes: int = 0,
        disk: bool = True,
        disk_bytes: int | None = None,
        shared: bool = False,
        quota_bytes: int | None = None,
        read_timeout_seconds: float = 5.0,
        write_timeout_seconds: float = 5.0,
        queue_bytes: int = 2**20,
        backoff_seconds: float = 0.05,
    ) -> None:
        self._backoff_seconds = backoff_seconds
        self.events: list[StoreEvent] = []
        self.tiers: dict[str, FaultyTier] = {}
        settings = []
        if host_bytes:
            settings.append(self._settings(MemoryTier(host_bytes), budget_bytes=host_bytes))
        common = {
            "read_timeout_seconds": read_timeout_seconds,
            "write_timeout_seconds": write_timeout_seconds,
            "queue_bytes": queue_bytes,
        }
        if disk:
            settings.append(self._settings(FileTier(root / "disk"), budget_bytes=disk_bytes, **common))
        if shared:
            tier = FileTier(root / "shared", name="shared", level=Level.SHARED)
            settings.append(self._settings(tier, **common))
        self.store = TieredStore(settings, observer=self.events.append, pin_quota_bytes=quota_bytes)

    def _settings(self, tier: MemoryTier | FileTier, **settings: object) -> TierSettings:
        wrapped = FaultyTier(tier)
        self.tiers[tier.name] = wrapped
        return TierSettings(wrapped, backoff_seconds=self._backoff_seconds, **settings)  # type: ignore[arg-type]

    def of(self, kind: type) -> list[StoreEvent]:
        """Events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def blocks_in(self, tier: str) -> set[BlockKey]:
        """What a tier really holds."""
        return {key for key, _ in self.tiers[tier].tier.list_blocks()}

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.store.close(2.0)


def read_all(
    store: TieredStore, names: Iterable[object], *, deadline_seconds: float | None = None
) -> list[list[bytes]]:
    """Parts of each of the blocks, read layer by layer."""
    located = store.locate([block_key(name) for name in names])
    parts: list[list[bytes]] = [[b""] * (2 * LAYERS) for _ in range(located.num_blocks)]
    for part in store.read(located, LAYERS, PART_BYTES, deadline_seconds=deadline_seconds):
        for i in range(part.num_blocks):
            run = slice(i * PART_BYTES, (i + 1) * PART_BYTES)
            parts[part.first_block + i][2 * part.layer] = bytes(part.keys[run])
            parts[part.first_block + i][2 * part.layer + 1] = bytes(part.values[run])
    return parts


def true_parts(names: Iterable[object]) -> list[list[bytes]]:
    """What `read_all` must return."""
    return [[bytes(part) for part in block(name, tenant=TENANT).parts] for name in names]
