"""Where sparse attention starts to pay: a cost model over a table of measured costs.

A row at position p costs, dense, `p * dense_pair`; sparse, `row + p * estimate_pair / stride + kept(p) * compute_pair`.
The kept share, before anybody calibrated this model, is the function below. Rows before the crossover take dense
attention: a choice by absolute position, fixed for a session's life, so that neither chunks nor appends can change a
result. The costs are a table and not a measurement at start: what decides is their ratio, which belongs to the kernels
and hardly to the machine, and a table gives every replica the same answer, however busy it is when it starts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .config import SaleConfig

# Kept share, sink and local included, of a query block at position p: 0.515 * (p / 2048) ** -0.6 at tau 0.004 and
# stride 1. Measured 2026-11-24 on four layers of Qwen2.5-Coder-1.5B (32K of source, 12 heads) and on all heads of
# SmolLM2-135M (three documents of 7,680 tokens): 0.76 at 1K, 0.51 at 2K, 0.34 at 4K, 0.32 at 8K, 0.13 at 16K, 0.09 at
# 30K. Half or double tau: 1.22 or 0.80 of that. Strides 2 and 4 keep less at the same tau. All with the paper's sum:
# thresholds relative to a sampled one keep less, so that with them sparse rows start a little late.
_KEPT_AT_2K = 0.515
_KEPT_DECAY = 0.6
_KEPT_TAU_EXPONENT = 0.32
_KEPT_BY_STRIDE = {1: 1.0, 2: 0.88, 4: 0.77}

_POSITION_STEP = 128
#: Keys of a streaming row: sink, window, and half of its own block.
_STREAMING_KEYS = 192
#: A crossover that no prompt reaches.
NEVER = 1 << 20


@dataclass(frozen=True)
class AttentionCosts:
    """Seconds by pair of one row and one key, and by row, of one query head, all threads of the machine at work.

    `call_seconds` is what the sparse passes of a layer cost however few rows they have, in all heads together.
    """

    dense_pair_seconds: float
    estimate_pair_seconds: float
    compute_pair_seconds: float
    row_seconds: float
    call_seconds: float = 0.0

    def sparse_row_seconds(self, position: int, tau: float, query_stride: int) -> float:
        """What a row at `position` is expected to cost if it is sparse, or streaming (tau infinite)."""
        if math.isinf(tau):
            return self.row_seconds + min(position, _STREAMING_KEYS) * self.compute_pair_seconds
        kept = expected_density(position, tau, query_stride)
        pairs = self.estimate_pair_seconds / query_stride + kept * self.compute_pair_seconds
        return self.row_seconds + position * pairs


def expected_density(position: int, tau: float, query_stride: int) -> float:
    """Kept share of a query block at `position`, where no profile says better."""
    share: float = _KEPT_AT_2K * (max(position, 1) / 2048) ** -_KEPT_DECAY * (tau / 0.004) ** -_KEPT_TAU_EXPONENT
    return min(1.0, share * _KEPT_BY_STRIDE[query_stride])


def measured_backends() -> tuple[str, ...]:
    """Names of backends with costs of their own."""
    return tuple(_COSTS)


def crossover_position(costs: AttentionCosts, tau: float, query_stride: int, config: SaleConfig) -> int:
    """First row position, a multiple of 128, from which sparse rows are expected to be cheaper than dense ones.

    At least `config.dense_rows`, before which the key centre is not known; `NEVER` where sparse rows do not pay.
    """
    return crossover_of_heads(costs, [(tau, query_stride)], config)


def crossover_of_heads(costs: AttentionCosts, heads: Iterable[tuple[float, int]], config: SaleConfig) -> int:
    """The same for heads with thresholds and strides of their own, all together; dense heads (tau 0) do not matter."""
    counted = Counter(head for head in heads if head[0] > 0)
    position = -(-config.dense_rows // _POSITION_STEP) * _POSITION_STEP
    while counted and position < NEVER:
        sparse = sum(n * costs.sparse_row_seconds(position, *head) for head, n in counted.items())
        if sparse < counted.total() * position * costs.dense_pair_seconds:
            return position
        position += max(_POSITION_STEP, position // 8 // _POSITION_STEP * _POSITION_STEP)
    return NEVER


def longest_dense_prompt(costs: AttentionCosts, heads: Iterable[tuple[float, int]], layers: int, crossover: int) -> int:
    """Most tokens, a multiple of 128, of a prompt whose rows from `crossover` on do not save `costs.call_seconds`.

    Args:
        costs: of the backend.
        heads: thresholds and strides of all heads of all layers.
        layers: how many have a sparse head.
        crossover: as of `crossover_of_heads`.
    """
    counted = Counter(head for head in heads if head[0] > 0)
    end, left = crossover, layers * costs.call_seconds
    while left > 0 and end < NEVER:
        middle = end + _POSITION_STEP // 2
        sparse = sum(n * costs.sparse_row_seconds(middle, *head) for head, n in counted.items())
        left -= _POSITION_STEP * (counted.total() * middle * costs.dense_pair_seconds - sparse)
        end += _POSITION_STEP
    return 0 if end == crossover else end


def costs_of(backend: str, head_dim: int, device_type: str = "cpu") -> AttentionCosts:
    """Costs of the backend described as `backend`, such as "cpu-avx512", at the nearest measured head_dim, scaled.

    The reference on a GPU launches thousands of small operations, so there sparse rows never pay.

    A backend that nobody measured counts as the reference does, a GPU like the one that was measured: what decides is
    the ratio of 8-bit to 16-bit products, which is 2 on all of them.
    """
    if backend == "reference" and device_type == "cuda":
        return AttentionCosts(0.0, 0.0, 0.0, math.inf)
    unknown = "cuda-sm90a" if backend.startswith("cuda-") else "reference"
    measured = _COSTS.get(backend, _COSTS[unknown])
    nearest = min(measured, key=lambda dim: abs(dim - head_dim))
    scale = head_dim / nearest * 1e-9
    dense_pair, estimate_pair, compute_pair, row, call = measured[nearest]
    return AttentionCosts(dense_pair * scale, estimate_pair * scale, compute_pair * scale, row * scale, call * 1e-9)


# Nanoseconds by backend and head_dim, in the order of AttentionCosts' fields. CPU: two cores of a Zen 4 EPYC, bfloat16,
# 512 rows at the end of 2048 keys, idle machine, 2026-11-24: `python -m benchmarks.attention_costs` prints such rows.
# CUDA: one H100, 65,536 tokens, 2026-11-25 (docs/cuda-kernels.md). There a row costs 0.4; what it has here is its share
# of the fixed costs of a call, which decide near the crossover: with 1.8, sparse rows start at 4,224 at stride 2. A
# prompt of 4K is then dense (239 us; sparse from 3,072 on 282, cuDNN 266), one of 6K takes 475 (dense 492, cuDNN 540).
_COSTS: dict[str, dict[int, tuple[float, float, float, float, float]]] = {
    "cpu-avx512": {64: (0.719, 0.140, 0.758, 178.5, 0.0), 128: (1.313, 0.268, 1.358, 312.7, 0.0)},
    "cpu-avx512_vnni": {64: (1.312, 0.142, 1.341, 171.7, 0.0), 128: (2.529, 0.263, 2.557, 318.6, 0.0)},
    "cpu-avx2": {64: (1.537, 0.412, 1.560, 221.2, 0.0), 128: (2.903, 0.833, 2.947, 378.2, 0.0)},
    "cpu-portable": {64: (7.353, 14.36, 7.364, 1149.0, 0.0), 128: (12.29, 29.09, 12.85, 1687.0, 0.0)},
    "reference": {64: (2.272, 0.684, 5.179, 818.9, 0.0), 128: (3.953, 0.854, 7.694, 1137.0, 0.0)},
    "cuda-sm90a": {128: (0.000790, 0.000160, 0.000850, 0.6, 100_000.0)},
}
