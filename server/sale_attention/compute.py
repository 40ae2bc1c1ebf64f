"""Computation pass: exact softmax attention over the selected, sink and local blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import HeadPlan
from .geometry import BlockGrid
from .kv_view import KvView
from .select import Selection, unpack_mask

# Lists are made for this many query blocks at a time: few operations, and scratch linear in the keys.
_PIECE_QUERY_BLOCKS = 64


def compute_selected(
    query: Tensor,
    kv: KvView,
    selection: Selection,
    plan: HeadPlan,
    grid: BlockGrid,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Attend to sink, selected and local blocks of each query block (SALE, arXiv 2505.24179, section 3.4).

    Arithmetic is float32 (float64 for float64 inputs). Every row sees at least its own key, so no row is empty. A
    non-finite key or value shows in the rows that attend to it, and may show in earlier rows of its query block, as
    in torch's fused kernels.

    Args:
        query: `[B, H, Nq, d]`, rows at the end of `kv`.
        kv: contiguous keys and values, H a multiple of Hkv.
        selection: kept blocks besides sink and local ones.
        plan: rows of heads that it calls dense are left as they are.
        grid: the blocks of this call.
        scale: softmax scale.
        output: `[B, H, Nq, d_v]` in the query's dtype, written.
        lse: float32 `[B, H, Nq]`, the natural log-sum-exp, written.

    Scratch memory: one KV head's keys and values in float32.
    """
    batch, heads = query.shape[:2]
    group = heads // kv.kv_heads
    for row in range(batch):
        for kv_head in range(kv.kv_heads):
            members = [h for h in range(kv_head * group, (kv_head + 1) * group) if not plan.dense[h]]
            if members:
                blocks = _HeadBlocks(kv, row, kv_head, grid)
                for head in members:
                    blocks.attend(
                        query[row, head], selection.words[row, head], scale, output[row, head], lse[row, head]
                    )


class _HeadBlocks:
    """Keys and values of one KV head, one row a key block, so that gathering blocks is one `index_select`."""

    def __init__(self, kv: KvView, batch: int, kv_head: int, grid: BlockGrid) -> None:
        self.grid = grid
        self.dtype = torch.float64 if kv.dtype == torch.float64 else torch.float32
        self.keys = self._as_blocks(kv.keys_between(0, kv.tokens)[batch, kv_head])
        self.values = self._as_blocks(kv.values_between(0, kv.tokens)[batch, kv_head])

    def _as_blocks(self, source: Tensor) -> Tensor:
        tokens, dim = source.shape
        blocks = source.new_zeros(self.grid.key_blocks * self.grid.key_block, dim, dtype=self.dtype)
        blocks[:tokens] = source
        return blocks.view(self.grid.key_blocks, -1)

    def attend(self, query: Tensor, words: Tensor, scale: float, output: Tensor, lse: Tensor) -> None:
        """Fill `output [Nq, d_v]` and `lse [Nq]` from `query [Nq, d]` and `words [query blocks, mask words]`."""
        for first in range(0, self.grid.query_blocks, _PIECE_QUERY_BLOCKS):
            lists = self._block_lists(words[first : first + _PIECE_QUERY_BLOCKS], first)
            for index, blocks in enumerate(lists, first):
                start, end = self.grid.rows(index)
                keys = self.keys.index_select(0, blocks).view(-1, query.shape[1])
                values = self.values.index_select(0, blocks).view(keys.shape[0], -1)
                scores = (query[start:end].to(self.dtype) * scale) @ keys.t()
                self._mask_future(scores, index)
                weights = torch.softmax(scores, dim=-1)
                output[start:end] = weights @ values
                # The largest weight is 1 / sum(exp(s - max)), so the log-sum-exp costs two maxima and no second exp.
                lse[start:end] = scores.amax(dim=-1) - weights.amax(dim=-1).log()

    def _block_lists(self, words: Tensor, first: int) -> tuple[Tensor, ...]:
        """Key blocks of each query block from the `first`-th on, ascending, so that the local ones come last."""
        mask = unpack_mask(words, self.grid.key_blocks)
        for index in range(mask.shape[0]):
            sink_end, local_start, local_end = self.grid.always_attended(first + index)
            mask[index, :sink_end] = True
            mask[index, local_start:local_end] = True
        counts: list[int] = mask.sum(dim=1).tolist()
        return torch.split(mask.nonzero()[:, 1], counts)

    def _mask_future(self, scores: Tensor, index: int) -> None:
        """-inf where a key comes after the row; the last columns of `scores` are the blocks up to the diagonal."""
        start, end = self.grid.rows(index)
        first = self.grid.offset + start + 1
        columns = self.grid.causal_end(index) * self.grid.key_block - first
        rows = torch.arange(end - start, device=scores.device)
        keys = torch.arange(columns, device=scores.device)
        scores[:, scores.shape[1] - columns :].masked_fill_(keys >= rows.unsqueeze(1), float("-inf"))
