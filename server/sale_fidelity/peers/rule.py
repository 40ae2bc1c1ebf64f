"""What a selection rule is: from the queries and keys of one head to the blocks it keeps, by one knob.

Every rule here is nested: what it keeps at a small knob, it keeps at a larger one. So a rule's whole answer is one
number a block, the knob from which on the block is kept, and any density is reached by looking up a quantile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .cost import EstimationCost

#: Rows that share a list of keys in every mask here, whatever a rule's own block is: SALE's, the finest of all.
QUERY_BLOCK = 64
ALWAYS = -math.inf
NEVER = math.inf

_BISECTIONS = 60


@dataclass(frozen=True, eq=False)
class Head:
    """Queries and keys of one head of a whole prompt, after rotary embedding.

    Attributes:
        query: `[N, d]`, any floating dtype.
        keys: `[N, d]`, likewise.
        scale: softmax scale.
        first_row: rows from here on are asked for, a multiple of 128; earlier ones are dense in every method.
    """

    query: Tensor
    keys: Tensor
    scale: float
    first_row: int = 0

    def __post_init__(self) -> None:
        if self.query.ndim != 2 or self.query.shape != self.keys.shape:
            raise ValueError(
                f"query {tuple(self.query.shape)} and keys {tuple(self.keys.shape)} must both be [tokens, head_dim]"
            )
        if self.first_row % 128 or not 0 <= self.first_row < self.tokens:
            raise ValueError(f"first_row={self.first_row} must be a multiple of 128 below the {self.tokens} tokens")

    @property
    def tokens(self) -> int:
        """Length of the prompt, N."""
        return self.query.shape[0]

    @cached_property
    def query32(self) -> Tensor:
        """The queries in float32, `[N, d]`."""
        return self.query.to(torch.float32)

    @cached_property
    def keys32(self) -> Tensor:
        """The keys in float32, `[N, d]`."""
        return self.keys.to(torch.float32)

    def last_rows_attention(self, rows: int) -> Tensor:
        """Dense causal attention weights of the last `rows` rows: float32 `[rows, N]`."""
        scores = (self.query32[-rows:] * self.scale) @ self.keys32.t()
        future = torch.ones(scores.shape[0], self.tokens, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(future.triu_(self.tokens - scores.shape[0] + 1), -math.inf)
        return torch.softmax(scores, dim=-1)


@dataclass(frozen=True, eq=False)
class DensityCurve:
    """How much is kept at each knob.

    Attributes:
        knobs: float32 `[n]`, ascending and distinct, on the CPU; the first may be `ALWAYS`.
        shares: float64 `[n]`, the density at each.
    """

    knobs: Tensor
    shares: Tensor

    def density(self, knob: float) -> float:
        """What is kept at `knob`."""
        place = int(torch.searchsorted(self.knobs, torch.tensor(knob, dtype=self.knobs.dtype), right=True))
        return float(self.shares[place - 1]) if place else 0.0

    def solve(self, density: float) -> float:
        """The knob whose density is nearest to `density`; the least one there is where even that is more."""
        place = int(torch.searchsorted(self.shares, torch.tensor(density, dtype=self.shares.dtype)))
        candidates = [index for index in (place - 1, place) if 0 <= index < len(self.knobs)]
        best = min(candidates, key=lambda index: abs(float(self.shares[index]) - density))
        return float(self.knobs[best])

    @property
    def finite_range(self) -> tuple[float, float]:
        """The least knob that keeps more than what is always kept, and one that keeps everything."""
        finite = self.knobs[self.knobs > ALWAYS]
        return (float(finite[0]), float(finite[-1])) if len(finite) else (0.0, 0.0)

    def thinned(self, points: int) -> DensityCurve:
        """At most `points` of the points, the first and the last among them."""
        if len(self.knobs) <= points:
            return self
        chosen = torch.linspace(0, len(self.knobs) - 1, points, dtype=torch.float64).round().long()
        return DensityCurve(self.knobs[chosen], self.shares[chosen])


class Levels:
    """The answer of a rule: from which knob on each block is kept.

    Attributes:
        values: float32 `[query blocks, key blocks]`; query block b is the rows from `first_row + 64 * b` on, key block
        j
            the keys from `key_block * j` on. `ALWAYS` is kept at any knob, `NEVER` at none (the future, above all).
        key_block: keys of a block, the rule's own number.
        tokens: length of the prompt.
        first_row: where the first query block starts.
    """

    def __init__(self, values: Tensor, key_block: int, head: Head) -> None:
        self.key_block, self.tokens, self.first_row = key_block, head.tokens, head.first_row
        expected = (-(-(head.tokens - head.first_row) // QUERY_BLOCK), -(-head.tokens // key_block))
        if tuple(values.shape) != expected:
            raise ValueError(f"levels have shape {tuple(values.shape)}, not {expected} (query blocks, key blocks)")
        self.values = values.masked_fill(self._visible_keys(values.device) == 0, NEVER)

    @property
    def query_blocks(self) -> int:
        """Query blocks from `first_row` on."""
        return self.values.shape[0]

    def rows(self, index: int) -> tuple[int, int]:
        """Absolute rows `[start, end)` of a query block."""
        start = self.first_row + QUERY_BLOCK * index
        return start, min(self.tokens, start + QUERY_BLOCK)

    def kept(self, knob: float) -> Tensor:
        """The mask at `knob`, at the rule's own granularity: bool `[query blocks, key blocks]`."""
        return self.values <= min(knob, torch.finfo(torch.float32).max)

    def kept_keys(self, index: int, knob: float) -> Tensor:
        """Keys that a query block attends to, ascending, up to its last row's own: int64 `[n]`."""
        kept = self.values[index] <= min(knob, torch.finfo(torch.float32).max)
        return kept.repeat_interleave(self.key_block)[: self.rows(index)[1]].nonzero().squeeze(1)

    def density(self, knob: float) -> float:
        """Share that is kept of the keys up to each block's last row, query blocks weighted by rows and these keys.

        Counted in keys, not in blocks, so that rules of different granularity compare; of a rule whose query block is
        larger than 64, the keys that only its later rows see do not count for the earlier ones.
        """
        return self.curve.density(knob)

    @property
    def least_density(self) -> float:
        """What is kept at every knob: sink, local, and whatever else the rule never drops."""
        return self.density(-torch.finfo(torch.float32).max)

    def solve(self, density: float) -> float:
        """The knob whose density is nearest to `density`; the least one there is where even that is more."""
        return self.curve.solve(density)

    def _visible_keys(self, device: torch.device) -> Tensor:
        """Keys of each block that a query block's last row sees: int32 `[query blocks, key blocks]`."""
        blocks = -(-(self.tokens - self.first_row) // QUERY_BLOCK)
        ends = torch.tensor([self.rows(index)[1] for index in range(blocks)], dtype=torch.int32, device=device)
        starts = torch.arange(0, self.tokens, self.key_block, dtype=torch.int32, device=device)
        return (ends.unsqueeze(1) - starts).clamp_(0, self.key_block)

    @cached_property
    def curve(self) -> DensityCurve:
        """The density at every knob that changes it."""
        sizes = [end - start for start, end in map(self.rows, range(self.query_blocks))]
        rows = torch.tensor(sizes, dtype=torch.int32, device=self.values.device)
        weights = self._visible_keys(self.values.device) * rows.unsqueeze(1)
        total = float(weights.sum(dtype=torch.float64))
        reachable = self.values < NEVER
        knobs, order = self.values[reachable].sort()
        shares = weights[reachable][order].to(torch.float64).cumsum(0) / total
        last = torch.ones_like(knobs, dtype=torch.bool)
        last[:-1] = knobs[1:] != knobs[:-1]
        return DensityCurve(knobs[last].cpu(), shares[last].cpu())


class SelectionRule(Protocol):
    """One method, its settings fixed but for the knob."""

    @property
    def name(self) -> str:
        """The method's, as its paper calls it."""

    @property
    def setting(self) -> str:
        """What tells this rule from others of the method; empty where there is but one."""

    def levels(self, head: Head) -> Levels:
        """Estimates, and says from which knob on each block is kept."""

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """Operations of the estimation for one head of a whole prompt."""


def solve_shared(curves: Sequence[DensityCurve], density: float) -> float:
    """One knob for several heads, their mean density the largest that does not exceed `density` (by bisection)."""
    low = min(curve.finite_range[0] for curve in curves)
    high = max(curve.finite_range[1] for curve in curves)
    for _ in range(_BISECTIONS):
        middle = low + (high - low) / 2
        mean = sum(curve.density(middle) for curve in curves) / len(curves)
        low, high = (middle, high) if mean <= density else (low, middle)
    return low


def block_means(rows: Tensor, block: int) -> Tensor:
    """Means of each `block` rows, the last block over the rows it has: `[N, d]` -> `[ceil(N / block), d]`."""
    count, dim = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -count % block)).view(-1, block, dim)
    sizes = torch.full((padded.shape[0], 1), float(block), device=rows.device)
    sizes[-1] = count - block * (padded.shape[0] - 1)
    return padded.sum(dim=1) / sizes


def cumulative_levels(mass: Tensor) -> Tensor:
    """By row of `mass [..., n]`: the share of the row's mass that its larger elements hold, an element's own left out.

    Keeping what has a level below p is the smallest set that holds p of the mass ("top-p", "top-cdf"). Equal elements
    keep their order.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.to(torch.float64).cumsum(dim=-1) - ordered
    totals = ordered.sum(dim=-1, keepdim=True, dtype=torch.float64)
    shares = before / totals.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.empty_like(mass, dtype=torch.float32).scatter_(-1, order, shares.to(torch.float32))


def of_query_blocks(values: Tensor, block: int, head: Head) -> Tensor:
    """Rows of `values [ceil(N / block), n]` by query blocks of 64 from `head.first_row` on, without copying blocks."""
    starts = torch.arange(head.first_row, head.tokens, QUERY_BLOCK, device=values.device)
    return values[starts // block]
