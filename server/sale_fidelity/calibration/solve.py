"""The cheapest settings whose expected effect on predictions stays within a budget.

Every head picks one setting of a menu; costs and effects of heads add up. Only settings on a head's lower convex hull
of effect against cost can be part of a solution for some price of effect (Lagrange), so: start with every head at its
cheapest, and take the steps along all hulls in order of effect saved by cost, steepest first. The states on the way are
the best for the effect that they have, and solve every budget in one walk; a lower budget only ever adds steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sale_attention.crossover import AttentionCosts

from .measure import Measurement
from .menu import Menu

#: Share of rows that count as if they had their head's p99 error; the others count as measured. With 0.3 the budget is
#: near the divergence found on held-out text (0.0011 budgeted, 0.0006 found; 0.0035, 0.0018), with 0 a quarter of it;
#: at equal cost the share hardly matters (default model, ten documents of 8K, one H100, 2026-11-25).
TAIL_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class HeadChoices:
    """Costs and effects of all settings of all heads, n heads of all layers in order.

    Attributes:
        cost: float64 `[n, settings]`, relative to dense attention of one head.
        effect: float64 `[n, settings]`, expected divergence of next-token predictions by this head, nats a token.
    """

    cost: Tensor
    effect: Tensor


def head_costs(measured: Measurement, menu: Menu, costs: AttentionCosts, block_pairs: int) -> Tensor:
    """Cost of every setting, dense (1.0) last: float64 `[H, settings]`, relative to dense attention of the same rows.

    Args:
        measured: blocks visited.
        menu: settings.
        costs: of the backend.
        block_pairs: pairs of a row and a key in a block.
    """
    pairs = measured.causal_blocks * block_pairs
    strides = [setting.query_stride for setting in menu.settings[: menu.measured]]
    estimated = torch.tensor([1.0 / stride for stride in strides], dtype=torch.float64)
    estimated[-1] = 0.0  # streaming estimates nothing
    seconds = (
        measured.rows * costs.row_seconds
        + pairs * estimated * costs.estimate_pair_seconds
        + measured.computed_blocks * block_pairs * costs.compute_pair_seconds
    )
    relative = seconds / (pairs * costs.dense_pair_seconds)
    return torch.nn.functional.pad(relative, (0, 1), value=1.0)


def head_effects(measured: Measurement, tail_share: float = TAIL_SHARE) -> Tensor:
    """Expected divergence of predictions by every setting, dense (0) last: float64 `[H, settings]`, nats a token.

    Half of the mean (g . delta)^2, with `tail_share` of the rows raised to the p99 of their setting's errors: a head
    that is harmless on average and loses the one row that looks for one key is not harmless.
    """
    mean = 0.5 * measured.effect / measured.rows
    squared = (measured.squared_error / measured.rows).clamp(min=1e-30)
    raised = measured.p99_error() ** 2 / squared
    effect = mean * (1.0 - tail_share + tail_share * raised.clamp(min=1.0))
    return torch.nn.functional.pad(effect, (0, 1))


def solve(choices: HeadChoices, budgets: Sequence[float]) -> list[list[int]]:
    """Settings of every head, for every budget.

    Args:
        choices: costs and effects.
        budgets: greatest sum of effects, each at least 0.

    Returns:
        For each budget, the index of each head's setting.

    Raises:
        ValueError: a negative or NaN budget.
    """
    if bad := [budget for budget in budgets if not budget >= 0]:
        raise ValueError(f"error budget {bad[0]} must be at least 0")
    walk = hull_walk(choices)
    chosen = walk.cheapest.copy()
    total = sum(float(choices.effect[head, setting]) for head, setting in enumerate(chosen))
    solutions: list[list[int]] = [[] for _ in budgets]
    steps = iter(walk.steps)
    for index in sorted(range(len(budgets)), key=lambda index: -budgets[index]):
        # A remainder without steps left is rounding: every head is at its least effect.
        while total > budgets[index] and (step := next(steps, None)) is not None:
            chosen[step.head] = step.setting
            total -= step.saved
        solutions[index] = list(chosen)
    return solutions


class Step(NamedTuple):
    """Head `head` (of all layers in order) moves to `setting`, which saves `saved` of effect for `price` of cost."""

    head: int
    setting: int
    saved: float
    price: float


class HullWalk(NamedTuple):
    """Every best state, as steps from the one where each head has its cheapest setting."""

    cheapest: list[int]
    steps: list[Step]


def hull_walk(choices: HeadChoices) -> HullWalk:
    """The steps along all heads' hulls, steepest first; equal ones in order of heads."""
    costs, effects = choices.cost.tolist(), choices.effect.tolist()
    hulls = [lower_hull(cost, effect) for cost, effect in zip(costs, effects, strict=True)]
    steps = []
    for head, hull in enumerate(hulls):
        cost, effect = costs[head], effects[head]
        for before, after in itertools.pairwise(hull):
            steps.append(Step(head, after, effect[before] - effect[after], cost[after] - cost[before]))
    # Slopes along a hull never get steeper, and sorting is stable, so each head's steps stay in order.
    steps.sort(key=lambda step: -step.saved / step.price)
    return HullWalk([hull[0] for hull in hulls], steps)


def lower_hull(cost: Sequence[float], effect: Sequence[float]) -> list[int]:
    """Settings on the lower convex hull of effect against cost, cheapest first, each with less effect than the last."""
    order = sorted(range(len(cost)), key=lambda index: (cost[index], effect[index], index))
    hull: list[int] = []
    for index in order:
        if hull and effect[index] >= effect[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(cost, effect, hull[-2], hull[-1]) >= _slope(cost, effect, hull[-1], index):
            hull.pop()
        if hull and cost[index] == cost[hull[-1]]:
            hull.pop()
        hull.append(index)
    return hull


def _slope(cost: Sequence[float], effect: Sequence[float], first: int, second: int) -> float:
    """Change of effect by cost, not positive; steeper means more negative."""
    run = cost[second] - cost[first]
    return (effect[second] - effect[first]) / run if run > 0 else float("-inf")
