"""Which methods stand side by side, and among which settings each may choose."""

from __future__ import annotations

from dataclasses import dataclass

from sale_attention import SaleConfig

from .flexprefill import FlexPrefill
from .minference import SPLITS, VerticalSlash
from .rule import SelectionRule
from .sale import Sale
from .spargeattn import SIMILARITIES, SpargeAttn
from .streaming import StreamingLlm
from .xattention import XAttention

#: Families: thresholds relative to a sample of a row's whole sum, as calibration makes them, or to the sum over sink
#: and local keys alone, as in the paper.
SALE = "SALE"
SALE_PAPER = "SALE, paper's threshold"
_PAPER = SaleConfig()


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
        Method("SALE, paper's threshold", (Sale(1, _PAPER),), SALE_PAPER),
        Method("SALE, paper's, stride 2", (Sale(2, _PAPER),), SALE_PAPER),
        Method("SALE, paper's, stride 4", (Sale(4, _PAPER),), SALE_PAPER),
        Method("MInference", tuple(VerticalSlash(split) for split in SPLITS)),
        Method("FlexPrefill", (FlexPrefill(),)),
        Method("XAttention S=8", (XAttention(8),)),
        Method("XAttention S=16", (XAttention(16),)),
        Method("SpargeAttn", tuple(SpargeAttn(similarity) for similarity in SIMILARITIES)),
        Method("StreamingLLM", (StreamingLlm(),)),
    )
