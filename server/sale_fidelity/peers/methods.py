"""Which methods stand side by side, and among which settings each may choose."""

from __future__ import annotations

from dataclasses import dataclass

from .flexprefill import FlexPrefill
from .minference import SPLITS, VerticalSlash
from .rule import SelectionRule
from .sale import Sale
from .spargeattn import SIMILARITIES, SpargeAttn
from .streaming import StreamingLlm
from .xattention import XAttention


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: what it is called there.
        rules: settings of which each head takes the best, as the method's own offline search would; one for most.
        is_peer: not SALE.
    """

    name: str
    rules: tuple[SelectionRule, ...]
    is_peer: bool = True


def methods() -> tuple[Method, ...]:
    """All of them; the first is SALE with every row inspected, which promises speak of."""
    return (
        Method("SALE", (Sale(1),), is_peer=False),
        Method("SALE stride 2", (Sale(2),), is_peer=False),
        Method("SALE stride 4", (Sale(4),), is_peer=False),
        # What the threshold's reference costs: not in the library, so no promise speaks of it.
        Method("SALE sampled", (Sale(1, sampled_every=16),), is_peer=False),
        Method("SALE sampled, stride 2", (Sale(2, sampled_every=16),), is_peer=False),
        Method("MInference", tuple(VerticalSlash(split) for split in SPLITS)),
        Method("FlexPrefill", (FlexPrefill(),)),
        Method("XAttention S=8", (XAttention(8),)),
        Method("XAttention S=16", (XAttention(16),)),
        Method("SpargeAttn", tuple(SpargeAttn(similarity) for similarity in SIMILARITIES)),
        Method("StreamingLLM", (StreamingLlm(),)),
    )
