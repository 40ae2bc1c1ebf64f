"""Where blocks were found, and the form in which they come."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from sale_prefill_server.store.base import BlockKey
from sale_prefill_server.store.slot import TierSlot


class Source(NamedTuple):
    """Where a block can be read, and under which key."""

    slot: TierSlot
    key: BlockKey


@dataclass(frozen=True)
class Located:
    """The leading blocks of those asked for that some tier has."""

    keys: tuple[BlockKey, ...]
    sources: tuple[tuple[Source, ...], ...] = field(repr=False)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be read, from the first one asked for."""
        return len(self.keys)

    @property
    def blocks_by_tier(self) -> dict[str, int]:
        """Blocks by the fastest tier that has them."""
        return dict(Counter(sources[0].slot.name for sources in self.sources))

    @property
    def is_lossless(self) -> bool:
        """Whether the fastest source of every block has it as it was."""
        return all(not sources[0].key.codec for sources in self.sources)


@dataclass(frozen=True)
class LayerPart:
    """K and V of one layer for adjacent blocks, [num_blocks * tokens, kv_heads, head_dim] as bytes.

    The buffers are good until the next one is asked for. Parts come layer by layer, blocks in order.
    """

    layer: int
    first_block: int
    num_blocks: int
    keys: memoryview
    values: memoryview
