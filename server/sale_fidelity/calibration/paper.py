"""The paper's calibration, exactly: per head the largest threshold whose L1 error stays within its budget.

SALE (arXiv 2505.24179, section 3.5 and the authors' code): tau starts at 0.008 and is halved until the sum over all
rows and dimensions of |o_sparse - o_dense| is below theta * Nq; a head that would get 1e-4 or less is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sale_attention import KvView, LayerPolicy, SaleConfig, attend
from sale_attention.backends import AUTO

from .capture import LayerCapture

FIRST_TAU = 0.008
DENSE_BELOW = 1e-4
THETA = 0.4
#: Every threshold that a sparse head can get, ascending.
TAUS = tuple(FIRST_TAU / 2**step for step in reversed(range(7)))


def paper_taus(
    capture: LayerCapture, centre: Tensor, config: SaleConfig, theta: float = THETA, backend: str = AUTO
) -> list[float]:
    """Thresholds of one layer's heads on one prompt; 0 where the head stays dense.

    Args:
        capture: the layer's attention; its gradient is not used.
        centre: float32 `[Hkv, d]`, subtracted from keys before they are quantised.
        config: block geometry and code width.
        theta: greatest mean L1 error of a row.
        backend: attention backend.
    """
    heads, rows = capture.query.shape[1:3]
    kv = KvView(capture.keys, capture.values)
    dense = capture.output[0].to(torch.float32)
    taus, settled = [FIRST_TAU] * heads, [False] * heads
    while not all(settled):
        # Settled heads are streaming here: they cost next to nothing, and are not looked at.
        trial = [float("inf") if done else tau for tau, done in zip(taus, settled, strict=True)]
        policy = LayerPolicy(torch.tensor(trial), torch.ones(heads, dtype=torch.int64), centre)
        result = attend(
            capture.query, kv, policy=policy, config=config, scale=capture.scale, backend=backend, return_lse=False
        )
        difference = (result.output[0].transpose(0, 1).to(torch.float32) - dense).abs()
        losses = difference.sum(dim=(0, 2), dtype=torch.float64).tolist()
        for head, loss in enumerate(losses):
            if not settled[head]:
                taus[head], settled[head] = _next(taus[head], loss < theta * rows)
    return taus


def _next(tau: float, within: bool) -> tuple[float, bool]:
    """The head's next threshold and whether it is the last."""
    if within:
        return tau, True
    tau /= 2
    return (tau, False) if tau > DENSE_BELOW else (0.0, True)
