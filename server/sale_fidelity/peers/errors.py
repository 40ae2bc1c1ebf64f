"""What a mask does to attention outputs: exact masks in float32, on sampled query blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rule import QUERY_BLOCK, Head, Levels


@dataclass(frozen=True, eq=False)
class BlockSample:
    """One query block of one head: its scores and its dense output.

    Attributes:
        index: the query block, counted from `Head.first_row`.
        scores: float32 `[rows, keys up to the last row]`, -inf where a key comes after a row.
        values: float32 `[keys, d_v]`.
        dense: float32 `[rows, d_v]`.
    """

    index: int
    scores: Tensor
    values: Tensor
    dense: Tensor

    @classmethod
    def of(cls, head: Head, values: Tensor, index: int) -> BlockSample:
        """Of query block `index`; `values [N, d_v]` in float32."""
        start = head.first_row + QUERY_BLOCK * index
        end = min(head.tokens, start + QUERY_BLOCK)
        scores = (head.query32[start:end] * head.scale) @ head.keys32[:end].t()
        future = torch.ones_like(scores, dtype=torch.bool).triu_(start + 1)
        scores.masked_fill_(future, float("-inf"))
        return cls(index, scores, values[:end], torch.softmax(scores, dim=-1) @ values[:end])

    def output(self, levels: Levels, knob: float) -> Tensor:
        """Attention over what is kept at `knob`: float32 `[rows, d_v]`."""
        keys = levels.kept_keys(self.index, knob)
        weights = torch.softmax(self.scores.index_select(1, keys), dim=-1)
        output: Tensor = weights @ self.values.index_select(0, keys)
        return output

    def row_errors(self, levels: Levels, knob: float) -> Tensor:
        """|o - o_dense| / |o_dense| by row, Euclidean norms: float32 `[rows]`."""
        difference = self.output(levels, knob) - self.dense
        errors: Tensor = torch.linalg.vector_norm(difference, dim=-1) / torch.linalg.vector_norm(self.dense, dim=-1)
        return errors


def sampled_blocks(query_blocks: int, count: int) -> list[int]:
    """The middle ones of `count` equal parts of the query blocks; all of them if there are no more.

    The last block is not singled out: rules that estimate from the last rows alone are exact there, and it would weigh
    more in a sample than in the prompt.
    """
    if count >= query_blocks:
        return list(range(query_blocks))
    return [query_blocks * (2 * part + 1) // (2 * count) for part in range(count)]


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Of the relative errors of some rows."""

    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, errors: Tensor) -> ErrorSummary:
        """`errors [n]`; the 99th percentile is the smallest error that 99 % of rows do not exceed."""
        place = max(0, -(-99 * len(errors) // 100) - 1)
        return cls(float(errors.mean(dtype=torch.float64)), float(errors.sort().values[place]), float(errors.max()))
