"""The torch reference: right on every device, fast nowhere; the oracle of every other backend. And "dense"."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute, quantise, sampled, select, sink_local
from .backends import AttentionBackend, AttentionRequest, register_backend
from .config import HeadPlan, SaleConfig
from .geometry import BlockGrid
from .kv_view import KvView
from .quantise import KeyCodes, QueryCodes
from .select import Selection


class ReferenceBackend(AttentionBackend):
    """The method in plain torch operations; gathers pages, works through bounded pieces, memory linear in the keys."""

    name = "reference"

    def supports(self, request: AttentionRequest) -> str | None:
        """Everything but a head_dim whose code products float32 cannot hold exactly."""
        if request.kv.head_dim > select.MAX_EXACT_HEAD_DIM:
            return f"head_dim {request.kv.head_dim} exceeds {select.MAX_EXACT_HEAD_DIM}, where code products are exact"
        return None

    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        """See `quantise.quantise_query`."""
        return quantise.quantise_query(query, grid, config)

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        """See `quantise.quantise_key_range`."""
        quantise.quantise_key_range(kv, config, start, out)

    def sink_local_lse(self, query: Tensor, kv: KvView, centre: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """See `sink_local.sink_local_log_sum_exp`."""
        return sink_local.sink_local_log_sum_exp(query, kv.gathered(), centre, grid, scale)

    def add_sampled(
        self,
        lse: Tensor,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        plan: HeadPlan,
        grid: BlockGrid,
        sample_stride: int,
        scale: float,
    ) -> None:
        """See `sampled.add_sampled`; all rows get theirs."""
        sampled.add_sampled(lse, query_codes, key_codes.gathered(grid.key_tokens), grid, sample_stride, scale)

    def select(
        self,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        thresholds: Tensor,
        plan: HeadPlan,
        grid: BlockGrid,
        kv: KvView,
    ) -> Selection:
        """See `select.select_blocks`."""
        exact_keys = kv if query_codes.block_means is None else kv.gathered()
        return select.select_blocks(query_codes, key_codes.gathered(kv.tokens), thresholds, plan, grid, exact_keys)

    def compute(
        self,
        query: Tensor,
        kv: KvView,
        selection: Selection,
        plan: HeadPlan,
        grid: BlockGrid,
        scale: float,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """See `compute.compute_selected`."""
        compute.compute_selected(query, kv.gathered(), selection, plan, grid, scale, output, lse)

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """As `compute`, with every block up to the diagonal kept."""
        batch, heads = query.shape[:2]
        ends = torch.tensor([grid.causal_end(index) for index in range(grid.query_blocks)], device=query.device)
        reached = torch.arange(grid.key_blocks, device=query.device) < ends.unsqueeze(1)
        words = select.pack_mask(reached).expand(batch, heads, -1, -1)
        plan = HeadPlan(strides=(0,) * heads, dense=(False,) * heads, unstrided_from=0)
        if lse is None:
            lse = torch.empty(query.shape[:3], device=query.device)
        every = Selection(words, grid.key_blocks)
        compute.compute_selected(query, kv.gathered(), every, plan, grid, scale, output, lse)


class DenseBackend(ReferenceBackend):
    """Never sparse: every call runs as dense SDPA, whatever the policy."""

    name = "dense"

    def supports(self, request: AttentionRequest) -> str | None:
        """Declines every sparse request."""
        return "the dense backend runs everything dense"


register_backend(ReferenceBackend())
register_backend(DenseBackend())
