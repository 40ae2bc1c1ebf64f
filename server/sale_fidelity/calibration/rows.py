"""The fewest blocks that keep the worst rows of attention's outputs within a budget.

The p99 of all heads' row errors together is at most X where no more than 1 % of the rows are off by more than X. That
share is a sum over heads, so heads trade: one that cannot get better cheaply may lose more rows than 1 %, others fewer.
What a block costs is not looked at, only how many there are; predictions are not, either.

Real text alone is calibrated on. Key-value retrieval beside it takes blocks to rows that other text does not have: with
two real documents and it 0.82 of the density of the paper's calibration (on its one prompt), with the two alone 0.75.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .measure import Measurement, error_sizes, quantile
from .solve import HeadChoices, hull_walk

#: Of rows, stay within the budget.
WITHIN = 0.99
#: A row counts as (error / budget) to this power, but no more than one that is off by twice the budget: samples are
#: small, and a row just within the budget on them is not on other text, nor one just above. Calibrated on three of four
#: documents (English and code, 8K) and judged on the fourth, on average, as shares of the density that the paper's rule
#: (theta 0.4, on the same three) needs for its p99: power 4 up to twice the budget 0.838, up to the budget 0.850; power
#: 2 or 3 up to twice 0.848, 0.840; squared errors without a limit 0.845; chosen on the fourth itself, 0.79. On two
#: further documents power 4 with either limit gives 0.86 (default model, two cores, bfloat16, 2026-11-25).
ROW_POWER, MOST_BUDGETS = 4.0, 2.0


def solve_rows(measured: Sequence[Measurement], budget: float) -> list[int]:
    """Settings of all heads of all layers in order: the fewest blocks with a p99 of row errors of at most `budget`.

    Args:
        measured: one a layer, of the same prompts.
        budget: relative row error, above 0.

    Returns:
        For each head the index of its setting, dense last.

    Raises:
        ValueError: a budget that is not above 0.
    """
    if not budget > 0:
        raise ValueError(f"row error budget {budget} must be above 0")
    histograms = torch.cat([_with_dense(layer) for layer in measured])
    density = torch.cat([torch.nn.functional.pad(layer.density(), (0, 1), value=1.0) for layer in measured])
    weight = (error_sizes() / budget).clamp(max=MOST_BUDGETS) ** ROW_POWER
    walk = hull_walk(HeadChoices(cost=density, effect=histograms.to(torch.float64) @ weight))
    chosen = walk.cheapest.copy()
    pooled = histograms[torch.arange(len(chosen)), torch.tensor(chosen)].sum(dim=0)
    for step in walk.steps:
        if float(quantile(pooled, WITHIN)) <= budget:
            break
        pooled += histograms[step.head, step.setting] - histograms[step.head, chosen[step.head]]
        chosen[step.head] = step.setting
    return chosen


def _with_dense(layer: Measurement) -> Tensor:
    """Errors of every setting counted by size, dense (none at all) last: int64 `[H, settings, ERROR_BINS]`."""
    counted = torch.nn.functional.pad(layer.histogram, (0, 0, 0, 1))
    counted[:, -1, 0] = layer.rows
    return counted
