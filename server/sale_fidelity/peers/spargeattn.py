"""SpargeAttn: attention of block means, where the blocks' tokens are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import EstimationCost, causal_pairs, sort_operations
from .rule import ALWAYS, Head, Levels, block_means, cumulative_levels, of_query_blocks

#: Self-similarities below which a block is not judged by its mean: the grid that the paper's search by layer is made
#: on.
SIMILARITIES = (-1.0, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class SpargeAttn:
    """From "SpargeAttention" (arXiv 2502.18137, section 3: selective token compression; top-cdf).

    Blocks of 128 rows and 64 keys. Their means give a map; each row's softmax keeps the smallest set that holds a share
    of its mass. A block whose self-similarity (mean cosine of its tokens with each other) is below `similarity` is left
    out of the map, and computed: a key block for every row, a query block with all of its keys. Knob: the share.
    `similarity` is searched by head, as the paper does by layer (3.6), on the prompt that is then judged by.

    The paper's second filter, which skips products with V inside the kernel, selects nothing and is not here. Where the
    paper is silent: first key block and diagonal blocks are always kept; a row of blocks sees a key block from its
    first key on.
    """

    similarity: float = 0.6
    query_block: int = 128
    key_block: int = 64
    name: str = "SpargeAttn"

    @property
    def setting(self) -> str:
        """The least self-similarity."""
        return "similarity off" if self.similarity <= -1 else f"similarity {self.similarity:g}"

    def levels(self, head: Head) -> Levels:
        """Cumulative mass by row of blocks."""
        query, keys = head.query32, head.keys32
        scores = (block_means(query, self.query_block) * head.scale) @ block_means(keys, self.key_block).t()
        row_starts = torch.arange(0, head.tokens, self.query_block, device=scores.device).unsqueeze(1)
        key_starts = torch.arange(0, head.tokens, self.key_block, device=scores.device)
        future = key_starts >= row_starts + self.query_block
        unlike_keys = self_similarity(keys, self.key_block) < self.similarity
        weights = torch.softmax(scores.masked_fill_(future | unlike_keys, float("-inf")), dim=-1)
        values = cumulative_levels(weights.nan_to_num_(0.0))  # a row may have no key block that is judged
        values[:, unlike_keys] = ALWAYS
        values[self_similarity(query, self.query_block) < self.similarity] = ALWAYS
        values[:, 0] = ALWAYS
        values.masked_fill_((key_starts >= row_starts) & ~future, ALWAYS)
        return Levels(of_query_blocks(values, self.query_block, head), self.key_block, head)

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """Pooling, self-similarity, the map with its softmax and sorts."""
        entries = causal_pairs(tokens) / (self.query_block * self.key_block)
        return EstimationCost(
            multiply_adds=entries * head_dim,
            # One addition a number for a mean, three for norm and self-similarity; of queries and of keys.
            element_operations=8.0 * tokens * head_dim + 8 * entries + sort_operations(entries),
        )


def self_similarity(rows: Tensor, block: int) -> Tensor:
    """Mean cosine of all pairs of rows of a block, a row with itself included: `[N, d]` -> `[ceil(N / block)]`."""
    units = torch.nn.functional.normalize(rows, dim=-1)
    return block_means(units, block).square().sum(dim=-1)
