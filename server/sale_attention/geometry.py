"""Where blocks lie: everything follows absolute positions, so chunking a prompt cannot move a block."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

from .config import SaleConfig

MASK_WORD_BITS = 32


@dataclass(frozen=True)
class BlockGrid:
    """Query and key blocks of one call with `query_tokens` rows at the end of `key_tokens` keys.

    Row i (of the call) stands at absolute position `offset + i` and sees keys 0 .. offset + i. Query block b covers
    absolute rows `[b * query_block, (b + 1) * query_block)`; the first and the last one may be partly present.
    Every query block attends to the sink blocks `[0, sink_blocks)`, and to its local blocks
    `[local_start(b), causal_end(b))`, which end at the diagonal; the blocks in between are for the selection.
    """

    query_tokens: int
    key_tokens: int
    query_block: int
    key_block: int
    sink_tokens: int
    local_tokens: int

    @classmethod
    @functools.lru_cache(maxsize=256)  # every layer of a chunk asks for the same
    def of(cls, query_tokens: int, key_tokens: int, config: SaleConfig) -> BlockGrid:
        """The grid of `query_tokens` rows at the end of `key_tokens` keys under `config`."""
        return cls(
            query_tokens, key_tokens, config.query_block, config.key_block, config.sink_tokens, config.local_tokens
        )

    @property
    def offset(self) -> int:
        """Absolute position of the first row."""
        return self.key_tokens - self.query_tokens

    @property
    def first_query_block(self) -> int:
        """Absolute index of the query block that holds the first row."""
        return self.offset // self.query_block

    @cached_property
    def query_blocks(self) -> int:
        """Query blocks that the rows touch."""
        return -(-self.key_tokens // self.query_block) - self.first_query_block

    @property
    def key_blocks(self) -> int:
        """Key blocks, the last one possibly partial."""
        return -(-self.key_tokens // self.key_block)

    @property
    def mask_words(self) -> int:
        """int32 words that hold one bit a key block."""
        return -(-self.key_blocks // MASK_WORD_BITS)

    @property
    def sink_blocks(self) -> int:
        """Leading key blocks that are always attended."""
        return self.sink_tokens // self.key_block

    def rows(self, index: int) -> tuple[int, int]:
        """Rows `[start, end)` of this call that lie in the `index`-th touched query block."""
        start = (self.first_query_block + index) * self.query_block - self.offset
        return max(0, start), min(self.query_tokens, start + self.query_block)

    def block_start(self, index: int) -> int:
        """Absolute position where the `index`-th touched query block starts, its first row present or not."""
        return (self.first_query_block + index) * self.query_block

    def local_start(self, index: int) -> int:
        """First local key block of the `index`-th touched query block."""
        return max(0, self.block_start(index) - self.local_tokens) // self.key_block

    def causal_end(self, index: int) -> int:
        """One past the last key block that the last row of the `index`-th touched query block sees."""
        return -(-(self.offset + self.rows(index)[1]) // self.key_block)

    def selectable(self, index: int) -> tuple[int, int]:
        """Key blocks `[start, end)` between sink and local blocks; empty where these meet."""
        return self.sink_blocks, max(self.sink_blocks, self.local_start(index))

    def always_attended(self, index: int) -> tuple[int, int, int]:
        """`(sink_end, local_start, local_end)` in key blocks, the two ranges `[0, sink_end)` and local disjoint."""
        local_end = self.causal_end(index)
        sink_end = min(self.sink_blocks, local_end)
        return sink_end, max(sink_end, self.local_start(index)), local_end

    def always_attended_blocks(self) -> int:
        """Sink and local blocks, summed over the touched query blocks."""
        return self._blocks[0]

    def causal_blocks(self) -> int:
        """Key blocks that causal attention visits, summed over the touched query blocks."""
        return self._blocks[1]

    @cached_property
    def _blocks(self) -> tuple[int, int]:
        always, causal = 0, 0
        for index in range(self.query_blocks):
            sink_end, local_start, local_end = self.always_attended(index)
            always += sink_end + local_end - local_start
            causal += self.causal_end(index)
        return always, causal
