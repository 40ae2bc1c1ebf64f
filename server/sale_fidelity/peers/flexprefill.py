"""FlexPrefill: pooled attention where it can be trusted, else vertical and slash lines; a share of the mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import EstimationCost, sort_operations
from .minference import diagonal_sums
from .rule import ALWAYS, Head, Levels, block_means, cumulative_levels, of_query_blocks


@dataclass(frozen=True)
class FlexPrefill:
    """From "FlexPrefill: A Context-Aware Sparse Attention Mechanism" (arXiv 2502.20766, section 4).

    The last 128 rows stand for the prompt (4.1): if the attention of their mean over means of key blocks is near to
    their true attention summed by block (square root of the Jensen-Shannon divergence below `tau`), the head is
    query-aware, else vertical-slash. Query-aware: the pooled map of all query and key blocks, each row a softmax,
    flattened and normalised; the largest entries are kept until they hold gamma of the sum (4.2). Vertical-slash:
    columns and diagonals of the true attention, each kept until they hold gamma. Knob: gamma. Published: blocks of 128,
    tau 0.1, gamma 0.9.

    Where the paper is silent: natural logarithms; columns and diagonals are summed by block of 128 before they are
    ordered, a diagonal going to the block diagonal nearest to it; first key block and diagonal block always kept (the
    paper's "first and last key block"). Its least budget of 1,024 tokens is left out, since a density is asked for.
    """

    tau: float = 0.1
    block: int = 128
    name: str = "FlexPrefill"
    setting: str = ""

    def levels(self, head: Head) -> Levels:
        """Cumulative mass of the map, or of the better one of column and diagonal."""
        attention = head.last_rows_attention(min(self.block, head.tokens))
        blocks = -(-head.tokens // self.block)
        values = self._pooled(head) if self.is_query_aware(head, attention) else self._lines(attention, blocks)
        values[:, 0] = ALWAYS
        values.fill_diagonal_(ALWAYS)
        return Levels(of_query_blocks(values, self.block, head), self.block, head)

    def is_query_aware(self, head: Head, attention: Tensor | None = None) -> bool:
        """Whether the pooled attention of the last rows is near enough to the true one."""
        if attention is None:
            attention = head.last_rows_attention(min(self.block, head.tokens))
        true = _sums_by_block(attention.mean(dim=0), self.block)
        keys = block_means(head.keys32, self.block)
        pooled = torch.softmax(keys @ (head.query32[-self.block :].mean(dim=0) * head.scale), dim=0)
        return float(jensen_shannon_distance(pooled, true)) < self.tau

    def _pooled(self, head: Head) -> Tensor:
        query, keys = block_means(head.query32, self.block), block_means(head.keys32, self.block)
        scores = (query * head.scale) @ keys.t()
        future = torch.ones_like(scores, dtype=torch.bool).triu_(1)
        weights = torch.softmax(scores.masked_fill_(future, float("-inf")), dim=-1)
        return cumulative_levels(weights.flatten()).view_as(weights)

    def _lines(self, attention: Tensor, blocks: int) -> Tensor:
        vertical = cumulative_levels(_sums_by_block(attention.sum(dim=0), self.block))
        nearest = torch.nn.functional.pad(diagonal_sums(attention), (self.block // 2, 0))
        slash = cumulative_levels(_sums_by_block(nearest, self.block)[:blocks])
        places = torch.arange(blocks, device=attention.device)
        return torch.minimum(slash[(places.unsqueeze(1) - places).clamp(min=0)], vertical)

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """Scores of the last rows, pooling, and the pooled map with its softmax and sort, be it needed or not."""
        pairs, map_entries = float(self.block * tokens), (tokens / self.block) ** 2 / 2
        return EstimationCost(
            multiply_adds=(pairs + map_entries) * head_dim,
            element_operations=2.0 * tokens * head_dim + 2 * pairs + 8 * map_entries + sort_operations(map_entries),
        )


def jensen_shannon_distance(first: Tensor, second: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of two distributions `[n]`, in nats."""
    middle = (first + second) / 2
    divergence = (_relative_entropy(first, middle) + _relative_entropy(second, middle)) / 2
    return divergence.clamp(min=0).sqrt()


def _relative_entropy(of: Tensor, to: Tensor) -> Tensor:
    return torch.where(of > 0, of * (of / to).log(), torch.zeros_like(of)).sum()


def _sums_by_block(mass: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(mass, (0, -len(mass) % block)).view(-1, block).sum(dim=1)
