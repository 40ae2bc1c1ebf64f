"""The paper's calibration, exactly: per head the largest threshold whose L1 error stays within its budget.

SALE (arXiv 2505.24179, section 3.5 and the authors' code): tau starts at 0.008 and is halved until the sum over all
rows and dimensions of |o_sparse - o_dense| is below theta * Nq; a head that would get 1e-4 or less is dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sale_attention import KvView, LayerPolicy, SaleConfig, attend
from sale_attention.backends import AUTO

from .capture import LayerCapture
from .menu import Menu

FIRST_TAU = 0.008
DENSE_BELOW = 1e-4
THETA = 0.4
#: Every threshold that a sparse head can get, ascending.
TAUS = tuple(FIRST_TAU / 2**step for step in reversed(range(7)))
#: These thresholds and no others, so that what is measured is exactly what the paper's calibration found.
MENU = Menu(taus=TAUS, strides=(1,))


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
    heads = capture.query.shape[1]
    taus, settled = [FIRST_TAU] * heads, [False] * heads
    while not all(settled):
        # Settled heads are streaming here: they cost next to nothing, and are not looked at.
        trial = [float("inf") if done else tau for tau, done in zip(taus, settled, strict=True)]
        for head, loss in enumerate(_row_losses(capture, centre, config, trial, backend).tolist()):
            if not settled[head]:
                taus[head], settled[head] = _next(taus[head], loss < theta)
    return taus


def paper_losses(capture: LayerCapture, centre: Tensor, config: SaleConfig, backend: str = AUTO) -> Tensor:
    """Mean L1 error of a row at each of `TAUS`, float64 `[TAUS, heads]`; for the arguments see `paper_taus`."""
    heads = capture.query.shape[1]
    return torch.stack([_row_losses(capture, centre, config, [tau] * heads, backend) for tau in TAUS])


def settled_taus(losses: Tensor, theta: float = THETA) -> list[float]:
    """What `paper_taus` finds, from one prompt's `paper_losses` or the mean of several's."""
    within = (losses < theta).t().tolist()
    return [max((tau for tau, fits in zip(TAUS, head, strict=True) if fits), default=0.0) for head in within]


def settings_of(taus: Sequence[Sequence[float]]) -> list[int]:
    """Indices into `MENU` of thresholds by layer and head (0: dense), heads of all layers in order."""
    return [TAUS.index(tau) if tau else MENU.measured for layer in taus for tau in layer]


def _row_losses(capture: LayerCapture, centre: Tensor, config: SaleConfig, taus: list[float], backend: str) -> Tensor:
    """Mean over rows of the L1 error, float64 `[heads]`, on the CPU."""
    heads, rows = capture.query.shape[1:3]
    policy = LayerPolicy(torch.tensor(taus), torch.ones(heads, dtype=torch.int64), centre)
    kv = KvView(capture.keys, capture.values)
    result = attend(
        capture.query, kv, policy=policy, config=config, scale=capture.scale, backend=backend, return_lse=False
    )
    difference = (result.output[0].transpose(0, 1).to(torch.float32) - capture.output[0].to(torch.float32)).abs()
    return (difference.sum(dim=(0, 2), dtype=torch.float64) / rows).cpu()


def _next(tau: float, within: bool) -> tuple[float, bool]:
    """The head's next threshold and whether it is the last."""
    if within:
        return tau, True
    tau /= 2
    return (tau, False) if tau > DENSE_BELOW else (0.0, True)
