"""XAttention: sums along antidiagonals, every S-th of them, stand for the attention of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import EstimationCost, causal_pairs, sort_operations
from .rule import ALWAYS, Head, Levels, cumulative_levels, of_query_blocks

# Rows of the map that are made at a time: at 32K and stride 8 a piece takes 16 MiB.
_PIECE_BLOCKS = 64


@dataclass(frozen=True)
class XAttention:
    """From "XAttention: Block Sparse Attention with Antidiagonal Scoring" (arXiv 2503.16428, section 2 and Algorithm
    1).

    Rows and keys are taken in groups of `stride`, the rows of a group backwards, so that the product of two groups is
    the sum of the scores on an antidiagonal. Softmax over the groups of keys with scale `1 / (sqrt(d) S)`, summed by
    blocks of 128 x 128 (2.1); each row of blocks keeps the smallest set that holds a threshold of its mass (2.2).
    Knob: that threshold. Published: stride 8 (the more accurate) and 16, threshold 0.9 or searched by head (2.3).

    Where the paper is silent: a group of keys is visible to its own group of rows and to later ones; first key block
    and diagonal block are always kept.
    """

    stride: int = 8
    block: int = 128
    name: str = "XAttention"

    @property
    def setting(self) -> str:
        """The stride."""
        return f"stride {self.stride}"

    def levels(self, head: Head) -> Levels:
        """Cumulative mass by row of blocks."""
        values = cumulative_levels(self._block_mass(head))
        first = head.first_row // self.block
        values[:, 0] = ALWAYS
        places = torch.arange(len(values), device=values.device)
        values[places, places + first] = ALWAYS
        before = values.new_full((first, values.shape[1]), ALWAYS)
        return Levels(of_query_blocks(torch.cat([before, values]), self.block, head), self.block, head)

    def _block_mass(self, head: Head) -> Tensor:
        """float32 `[row blocks from first_row on, key blocks]`."""
        padding = (0, 0, 0, -head.tokens % self.block)
        query = torch.nn.functional.pad(head.query32[head.first_row :], padding)
        query = query.view(-1, self.stride, query.shape[1]).flip(1).flatten(1) * (head.scale / self.stride)
        keys = torch.nn.functional.pad(head.keys32, padding).view(-1, query.shape[1])
        groups, first, step = self.block // self.stride, head.first_row // self.stride, _PIECE_BLOCKS
        pieces = []
        for start in range(0, len(query), step * groups):
            scores = query[start : start + step * groups] @ keys.t()
            rows = torch.arange(start, start + len(scores), device=scores.device).unsqueeze(1) + first
            scores.masked_fill_(torch.arange(len(keys), device=scores.device) > rows, float("-inf"))
            weights = torch.softmax(scores, dim=-1)
            weights *= rows * self.stride < head.tokens  # rows that only fill up the last block
            pieces.append(weights.view(-1, groups, weights.shape[1] // groups, groups).sum(dim=(1, 3)))
        return torch.cat(pieces)

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """One product of head_dim for every `stride` pairs, sums by block, a sort by row of blocks."""
        pairs = causal_pairs(tokens)
        entries = pairs / self.block**2
        return EstimationCost(
            multiply_adds=pairs / self.stride * head_dim,
            element_operations=pairs / self.stride**2 + sort_operations(entries),
        )
