"""What a head may be set to: a grid of thresholds and strides, streaming, dense."""

from __future__ import annotations

from dataclasses import dataclass

from sale_attention.config import QUERY_STRIDES
from sale_attention.profile import HeadSetting

#: Every how many-th key counts in a row's sum, beside sink and local ones. p99 row error at equal density, one knob a
#: trace, as shares of the sink-local threshold's (four 32K traces, densities 0.05 to 0.3, 24 query blocks a head,
#: geometric mean): 16: 0.885, 32: 0.899, 64: 0.920, 128: 0.942 (two cores, 2026-11-25, products of exact keys; with
#: their codes: `python -m benchmarks.fidelity_peers --sample-strides 64 128`).
SAMPLE_STRIDE = 32
#: Thresholds on offer. Relative to a row's whole sum these are shares of its attention: at 8K an even share is 0.0001.
TAUS = tuple(0.000125 * 2**step for step in range(10))

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
