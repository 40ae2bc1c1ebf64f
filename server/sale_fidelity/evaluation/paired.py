"""Paired yes-or-no outcomes: how much worse the second may be, with confidence."""

from __future__ import annotations

import math
from statistics import NormalDist

#: One-sided.
CONFIDENCE = 0.95
_BISECTIONS = 60


def worst_loss(num_items: int, lost: int, won: int, confidence: float = CONFIDENCE) -> float:
    """Upper confidence bound on the loss of accuracy, p(first right) - p(second right), from paired items.

    Tango's score bound (Statistics in Medicine 17, 1998, 891-908): of all differences that a one-sided score test at
    this confidence does not reject, the largest. It holds where few or no pairs differ, where Wald's is too narrow.

    Args:
        num_items: pairs.
        lost: pairs that the first got right and the second wrong.
        won: pairs the other way round.
        confidence: one-sided.

    Raises:
        ValueError: more differing pairs than pairs, or none at all.
    """
    if num_items < 1 or min(lost, won) < 0 or lost + won > num_items:
        raise ValueError(f"{lost} lost and {won} won cannot be of {num_items} paired items")
    limit = NormalDist().inv_cdf(confidence)
    low, high = (lost - won) / num_items, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _score(num_items, lost, won, middle) < -limit else (middle, high)
    return high


def _score(num_items: int, lost: int, won: int, loss: float) -> float:
    """Standardised distance of what was found from a true loss of `loss`, whose variance is estimated at that loss."""
    a = 2 * num_items
    b = -lost - won + (a - lost + won) * loss
    c = -won * loss * (1 - loss)
    won_share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = num_items * (2 * won_share + loss * (1 - loss))
    distance = lost - won - num_items * loss
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)
