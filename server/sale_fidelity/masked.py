"""Attention backend "masked": the reference's results in few large operations, for measuring on a GPU or in float32.

Every score is computed and what the selection drops is masked, so it is never faster than dense attention; but where
the reference launches thousands of small operations a layer, this launches tens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sale_attention.backends import AttentionRequest, register_backend
from sale_attention.config import HeadPlan
from sale_attention.geometry import BlockGrid
from sale_attention.kv_view import KvView
from sale_attention.quantise import KeyCodes, QueryCodes
from sale_attention.reference import ReferenceBackend
from sale_attention.select import Selection, code_products, pack_mask, voting_rows

NAME = "masked"
# Scores of a piece: 256 MB in float32.
_PIECE_SCORES = 1 << 26


class MaskedBackend(ReferenceBackend):
    """As the reference, whose selection it equals bit by bit; outputs agree to float32 rounding."""

    name = NAME

    def supports(self, request: AttentionRequest) -> str | None:
        """8-bit codes only."""
        if request.config.code_bits != 8:
            return f"the {NAME} backend measures 8-bit codes, not {request.config.code_bits}-bit ones"
        return super().supports(request)

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
        batch, heads, rows, dim = query_codes.codes.shape
        key_codes = key_codes.gathered(kv.tokens)
        mask = torch.zeros(batch, heads, grid.query_blocks, grid.key_blocks, dtype=torch.bool, device=thresholds.device)
        votes = _votes(grid, plan, heads).to(thresholds.device)
        owners = _block_of_row(grid).to(thresholds.device)
        group = heads // kv.kv_heads
        for row in range(batch):
            for kv_head in range(kv.kv_heads):
                members = slice(kv_head * group, (kv_head + 1) * group)
                for piece in _pieces(rows, group * grid.key_tokens, grid):
                    codes = query_codes.codes[row, members, piece].reshape(-1, dim)
                    largest = _block_maxima(codes, key_codes.codes[row, kv_head], grid)
                    estimate = largest.view(group, -1, grid.key_blocks) * key_codes.scales[row, kv_head]
                    keep = ~(estimate <= thresholds[row, members, piece].unsqueeze(2))
                    keep &= votes[members, piece].unsqueeze(2)
                    _any_by_block(keep, owners[piece], mask[row, members])
        return Selection(pack_mask(mask & _selectable(grid).to(mask.device)), grid.key_blocks)

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
        kv = kv.gathered()
        mask = selection.mask() | _always_attended(grid).to(query.device)
        owners = _block_of_row(grid).to(query.device)
        group = query.shape[1] // kv.kv_heads
        for row in range(query.shape[0]):
            for kv_head in range(kv.kv_heads):
                members = [h for h in range(kv_head * group, (kv_head + 1) * group) if not plan.dense[h]]
                keys, values = (source[row, kv_head].to(torch.float32) for source in _contiguous(kv))
                for piece in _pieces(grid.query_tokens, max(1, len(members)) * grid.key_tokens, grid):
                    if not members:
                        continue
                    scores = (query[row, members, piece].to(torch.float32) * scale) @ keys.t()
                    _mask_scores(scores, mask[row, members][:, owners[piece]], piece.start, grid)
                    sums = torch.logsumexp(scores, dim=-1)
                    weights = scores.sub_(sums.unsqueeze(-1)).exp_()
                    output[row, members, piece] = (weights @ values).to(output.dtype)
                    lse[row, members, piece] = sums

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """As `compute`, with every block kept."""
        batch, heads = query.shape[:2]
        every = torch.ones(batch, heads, grid.query_blocks, grid.key_blocks, dtype=torch.bool, device=query.device)
        plan = HeadPlan(strides=(0,) * heads, dense=(False,) * heads, unstrided_from=0)
        sums = torch.empty(query.shape[:3], device=query.device) if lse is None else lse
        self.compute(query, kv, Selection(pack_mask(every), grid.key_blocks), plan, grid, scale, output, sums)


def _pieces(rows: int, scores_a_row: int, grid: BlockGrid) -> list[slice]:
    size = max(grid.query_block, _PIECE_SCORES // scores_a_row // grid.query_block * grid.query_block)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _contiguous(kv: KvView) -> tuple[Tensor, Tensor]:
    return kv.keys_between(0, kv.tokens), kv.values_between(0, kv.tokens)


def _block_of_row(grid: BlockGrid) -> Tensor:
    """int64 `[rows]`: the touched query block of each row of the call."""
    return torch.arange(grid.offset, grid.key_tokens) // grid.query_block - grid.first_query_block


def _votes(grid: BlockGrid, plan: HeadPlan, heads: int) -> Tensor:
    """bool `[heads, rows]`: which rows are inspected."""
    by_stride = {0: torch.zeros(grid.query_tokens, dtype=torch.bool)}
    for stride in set(plan.strides) - {0}:
        votes = torch.zeros(grid.query_tokens, dtype=torch.bool)
        for index in range(grid.query_blocks):
            rows = voting_rows(grid, plan, stride, index)
            votes[rows.start : rows.stop : rows.step] = True
        by_stride[stride] = votes
    return torch.stack([by_stride[plan.strides[head]] for head in range(heads)])


def _block_maxima(codes: Tensor, key_codes: Tensor, grid: BlockGrid) -> Tensor:
    """float32 `[R, key blocks]`; a partial last block is never selectable, so zeros may pad it."""
    products = code_products(codes, key_codes)
    padded = torch.nn.functional.pad(products, (0, -products.shape[1] % grid.key_block))
    return padded.view(codes.shape[0], grid.key_blocks, grid.key_block).amax(dim=-1).to(torch.float32)


def _any_by_block(keep: Tensor, owners: Tensor, out: Tensor) -> None:
    """Set in `out [heads, query blocks, key blocks]` whatever any row of `keep [heads, rows, key blocks]` keeps."""
    count = torch.zeros(out.shape, dtype=torch.float32, device=keep.device)
    count.index_add_(1, owners, keep.to(torch.float32))
    out |= count > 0


def _selectable(grid: BlockGrid) -> Tensor:
    """bool `[query blocks, key blocks]`."""
    mask = torch.zeros(grid.query_blocks, grid.key_blocks, dtype=torch.bool)
    for index in range(grid.query_blocks):
        start, end = grid.selectable(index)
        mask[index, start:end] = True
    return mask


def _always_attended(grid: BlockGrid) -> Tensor:
    """bool `[query blocks, key blocks]`: sink and local blocks."""
    mask = torch.zeros(grid.query_blocks, grid.key_blocks, dtype=torch.bool)
    for index in range(grid.query_blocks):
        sink_end, local_start, local_end = grid.always_attended(index)
        mask[index, :sink_end] = True
        mask[index, local_start:local_end] = True
    return mask


def _mask_scores(scores: Tensor, blocks: Tensor, first_row: int, grid: BlockGrid) -> None:
    """-inf in `scores [heads, rows, keys]` where `blocks [heads, rows, key blocks]` or causality say no."""
    kept = blocks.repeat_interleave(grid.key_block, dim=2)[..., : grid.key_tokens]
    positions = torch.arange(scores.shape[1], device=scores.device) + grid.offset + first_row
    future = torch.arange(grid.key_tokens, device=scores.device) > positions.unsqueeze(1)
    scores.masked_fill_(~kept | future, float("-inf"))


register_backend(MaskedBackend())
