"""What a head may be set to: a grid of thresholds and strides, streaming, dense."""

from __future__ import annotations

from dataclasses import dataclass

from sale_attention.config import QUERY_STRIDES
from sale_attention.profile import HeadSetting

#: Thresholds on offer. Below the least, four fifths of all blocks are kept at 3K and dense is cheaper; above the
#: largest, a head hardly selects anything (default model, 2026-11-26).
TAUS = tuple(0.0005 * 2**step for step in range(9))

STREAMING = HeadSetting("streaming", None, 1)
DENSE = HeadSetting("dense", None, 1)


@dataclass(frozen=True)
class Menu:
    """Settings in a fixed order: sparse ones (all thresholds of a stride together), streaming, dense.

    Attributes:
        taus: thresholds, ascending.
        strides: query strides, ascending.
    """

    taus: tuple[float, ...] = TAUS
    strides: tuple[int, ...] = QUERY_STRIDES

    @property
    def settings(self) -> tuple[HeadSetting, ...]:
        """All of them."""
        sparse = (HeadSetting("sparse", tau, stride) for stride in self.strides for tau in self.taus)
        return (*sparse, STREAMING, DENSE)

    @property
    def measured(self) -> int:
        """Leading settings whose error must be measured: all but dense."""
        return len(self.settings) - 1
