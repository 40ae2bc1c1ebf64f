"""Copies that a CUDA device makes: from its memory to registered host memory and back, or within it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """One stream a device for transfers, so that they wait for no kernels but those that made their bytes."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def copy_and_wait(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], ready: Any) -> None:
    """Copies each second tensor into the first and waits for the end of that.

    Args:
        pairs: tensors of equal shape; host memory must be registered with the device to be fast.
        ready: `torch.cuda.Event` to wait for on the device; None waits for the default stream.
    """
    target, source = pairs[0]
    device = source.device if source.is_cuda else target.device
    stream = _side_stream(device)
    if ready is None:
        stream.wait_stream(torch.cuda.default_stream(device))
    else:
        stream.wait_event(ready)
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        done = stream.record_event()
    done.synchronize()
