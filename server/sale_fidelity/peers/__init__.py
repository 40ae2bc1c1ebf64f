"""Selection rules of other methods, written from their papers, and SALE's behind the same interface.

`methods()` gives them all. A rule says from which knob on each block of a head is kept (`Levels`); `Levels.solve` finds
the knob of a density; `errors.BlockSample` what the outputs then miss. For measuring only: nothing here is quick.
"""

from .cost import EstimationCost
from .flexprefill import FlexPrefill
from .methods import SALE, SALE_PAPER, Method, methods
from .minference import VerticalSlash
from .rule import QUERY_BLOCK, DensityCurve, Head, Levels, SelectionRule, solve_shared
from .sale import Sale
from .spargeattn import SpargeAttn
from .streaming import StreamingLlm
from .xattention import XAttention

__all__ = [
    "QUERY_BLOCK",
    "SALE",
    "SALE_PAPER",
    "DensityCurve",
    "EstimationCost",
    "FlexPrefill",
    "Head",
    "Levels",
    "Method",
    "Sale",
    "SelectionRule",
    "SpargeAttn",
    "StreamingLlm",
    "VerticalSlash",
    "XAttention",
    "methods",
    "solve_shared",
]
