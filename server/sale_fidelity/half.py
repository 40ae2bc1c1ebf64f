"""Attention backend "half": a GPU's kernels for a model in float32, which they do not take, for long measurements.

Queries, keys and values are rounded to float16, three bits more than bfloat16 has; the rest of the model stays float32.
Dense rows go the same way, so that what differs is what SALE dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sale_attention.backends import LayerCall, get_backend, register_backend
from sale_attention.geometry import BlockGrid
from sale_attention.kv_view import KvView
from sale_attention.reference import ReferenceBackend

NAME = "half"


class HalfBackend(ReferenceBackend):
    """The backend "cuda" in float16; where that has no kernels, the reference in float16."""

    name = NAME

    def takes_dense(self, query: Tensor, kv: KvView) -> bool:
        """Always: both ways have the same rounding."""
        return True

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """See `AttentionBackend.attend_all`."""
        rounded = torch.empty_like(output, dtype=torch.float16)
        get_backend("cuda").attend_all(query.half(), _half(kv), grid, scale, rounded, lse)
        output.copy_(rounded)

    def attend_layer(self, call: LayerCall) -> None:
        """See `AttentionBackend.attend_layer`."""
        rounded = torch.empty_like(call.output, dtype=torch.float16)
        get_backend("cuda").attend_layer(call._replace(query=call.query.half(), kv=_half(call.kv), output=rounded))
        call.output.copy_(rounded)


def _half(kv: KvView) -> KvView:
    return KvView(kv.keys.half(), kv.values.half(), kv.page_table, kv.length)


register_backend(HalfBackend())
