"""From measurements to the levels of a profile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sale_attention import SaleConfig
from sale_attention.crossover import AttentionCosts
from sale_attention.profile import HeadMeasure, Level

from .measure import Measurement, quantile
from .menu import Menu
from .rows import solve_rows
from .solve import TAIL_SHARE, HeadChoices, head_costs, head_effects, solve

#: Of a level that changes nothing.
_LEAST_BUDGET = 1e-9


def head_choices(
    measured: Sequence[Measurement],
    menu: Menu,
    costs: AttentionCosts,
    config: SaleConfig,
    tail_share: float = TAIL_SHARE,
) -> HeadChoices:
    """Costs and effects of all heads of all layers.

    Args:
        measured: one a layer.
        menu: settings that were measured.
        costs: of the backend.
        config: block geometry.
        tail_share: see `solve.head_effects`.
    """
    block_pairs = config.query_block * config.key_block
    return HeadChoices(
        cost=torch.cat([head_costs(layer, menu, costs, block_pairs) for layer in measured]),
        effect=torch.cat([head_effects(layer, tail_share) for layer in measured]),
    )


def budget_levels(
    measured: Sequence[Measurement], menu: Menu, choices: HeadChoices, budgets: Sequence[float]
) -> list[Level]:
    """The cheapest settings within each of `budgets`, ascending, nats a token."""
    ordered = sorted(set(budgets))
    return [
        level_of(budget, chosen, measured, menu, choices.cost)
        for budget, chosen in zip(ordered, solve(choices, ordered), strict=True)
    ]


def row_levels(
    measured: Sequence[Measurement], menu: Menu, choices: HeadChoices, budgets: Sequence[float]
) -> list[Level]:
    """A level for each of `budgets`: the fewest blocks whose row errors have a p99 within it.

    Their `error_budget` is what they are expected to do to predictions, as everywhere.
    """
    solved = [solve_rows(measured, budget) for budget in budgets]
    return [level_of(expected_effect(choices, chosen), chosen, measured, menu, choices.cost) for chosen in solved]


def expected_effect(choices: HeadChoices, chosen: Sequence[int]) -> float:
    """Expected divergence of predictions with each head at its setting, nats a token; above 0, as every budget."""
    total = float(choices.effect[torch.arange(len(chosen)), torch.tensor(chosen)].sum())
    return _rounded(max(total, _LEAST_BUDGET))


def level_of(budget: float, chosen: Sequence[int], measured: Sequence[Measurement], menu: Menu, cost: Tensor) -> Level:
    """A level out of each head's setting (index into the menu), heads of all layers in order."""
    heads = measured[0].computed_blocks.shape[0]
    index = torch.tensor(chosen).view(len(measured), heads)
    parts = [_chosen(layer, row, menu) for layer, row in zip(measured, index, strict=True)]
    density, mean, p99, histogram = (torch.stack(column) for column in zip(*parts, strict=True))
    weights = torch.stack([layer.causal_blocks for layer in measured]).unsqueeze(1).expand_as(density)
    return Level(
        error_budget=float(budget),
        settings=tuple(tuple(menu.settings[setting] for setting in row) for row in index.tolist()),
        measures=tuple(
            tuple(HeadMeasure(*(_rounded(value) for value in head)) for head in zip(*layer, strict=True))
            for layer in zip(density.tolist(), mean.tolist(), p99.tolist(), strict=True)
        ),
        density=_rounded(float((density * weights).sum() / weights.sum())),
        mean_error=_rounded(float(mean.mean())),
        p99_error=_rounded(float(quantile(histogram.sum(dim=(0, 1)), 0.99))),
        estimated_cost=_rounded(float(cost[torch.arange(len(chosen)), torch.tensor(chosen)].mean())),
    )


def _chosen(layer: Measurement, index: Tensor, menu: Menu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Density, mean error, p99 error `[H]` and counted errors `[H, bins]` of one layer's heads at their settings."""
    dense = index == menu.measured
    place = index.clamp(max=menu.measured - 1).unsqueeze(1)
    density, mean, p99 = (
        torch.where(dense, value, column.gather(1, place).squeeze(1))
        for value, column in ((1.0, layer.density()), (0.0, layer.mean_error()), (0.0, layer.p99_error()))
    )
    histogram = layer.histogram[torch.arange(len(index)), place.squeeze(1)]
    exact = torch.zeros_like(histogram)
    exact[:, 0] = layer.rows
    return density, mean, p99, torch.where(dense.unsqueeze(1), exact, histogram)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
