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

#: Families: thresholds relative to the sink-local sum (the paper's), or to a sampled estimate of the whole sum.
SALE = "SALE"
SALE_SAMPLED = "SALE sampled"


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: what it is called there.
        rules: settings of which each head takes the best, as the method's own offline search would; one for most.
        family: of SALE's variants, which threshold it takes; empty for a peer.
    """

    name: str
    rules: tuple[SelectionRule, ...]
    family: str = ""

    @property
    def is_peer(self) -> bool:
        """Not SALE."""
        return not self.family


def methods() -> tuple[Method, ...]:
    """All of them; of each family of SALE the first inspects every row, and promises speak of that one."""
    return (
        Method("SALE", (Sale(1),), SALE),
        Method("SALE stride 2", (Sale(2),), SALE),
        Method("SALE stride 4", (Sale(4),), SALE),
        # Not in the library: what a better reference for the threshold would give.
        Method("SALE sampled", (Sale(1, sampled_every=16),), SALE_SAMPLED),
        Method("SALE sampled, stride 2", (Sale(2, sampled_every=16),), SALE_SAMPLED),
        Method("SALE sampled, stride 4", (Sale(4, sampled_every=16),), SALE_SAMPLED),
        Method("MInference", tuple(VerticalSlash(split) for split in SPLITS)),
        Method("FlexPrefill", (FlexPrefill(),)),
        Method("XAttention S=8", (XAttention(8),)),
        Method("XAttention S=16", (XAttention(16),)),
        Method("SpargeAttn", tuple(SpargeAttn(similarity) for similarity in SIMILARITIES)),
        Method("StreamingLLM", (StreamingLlm(),)),
    )
