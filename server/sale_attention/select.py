"""Selection pass: which key blocks, besides sink and local ones, each query block attends to.

A block is kept if any inspected row of it has any key whose estimated score exceeds the row's threshold (SALE,
arXiv 2505.24179, section 3.3). With product m = max over the 32 keys of the int32 code product, key scale c and row
threshold T (`sink_local.row_thresholds`), the whole decision is

    8-bit:  keep if not (float32(m) * c <= T)
    4-bit:  keep if not (max over keys of (float32(m_j) * (c * s) + g_j) <= T)

where, with 4-bit codes, s is the row's query scale and g_j = (query block mean) . (k_j - centre) in float32 restores
what centring the queries took away; c * s, the product and the sum are rounded one by one (no fused multiply-add).
The compare is unordered: whatever is not provably below the threshold, a NaN for one, is kept, so that non-finite
inputs show in the output, as they do in dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import HeadPlan
from .geometry import MASK_WORD_BITS, BlockGrid
from .kv_view import KvView
from .quantise import KeyCodes, QueryCodes

# Products of a piece, at most 512 rows by 1024 keys of int32, stay in the last-level cache.
_PIECE_ROWS = 512
_PIECE_KEY_BLOCKS = 32

# float32 sums of integers are exact below this, so head_dim * 127 * 127 must not exceed it.
MAX_EXACT_HEAD_DIM = 2**24 // 127**2


@dataclass(frozen=True, eq=False)
class Selection:
    """Kept key blocks as a bitmask; sink and local blocks are never part of it.

    Attributes:
        words: int32 `[B, H, query blocks, ceil(key blocks / 32)]`; bit b of word w is key block `32 * w + b`.
        key_blocks: key blocks that the words speak of.
    """

    words: Tensor
    key_blocks: int

    def mask(self) -> Tensor:
        """The bits as bool `[B, H, query blocks, key blocks]`: 8 to 32 times the size of the words."""
        return unpack_mask(self.words, self.key_blocks)

    def block_list(self, batch: int, head: int, index: int) -> Tensor:
        """Kept key blocks of one query block, ascending: int64 `[n]`."""
        return unpack_mask(self.words[batch, head, index], self.key_blocks).nonzero().squeeze(1)

    def kept_blocks(self) -> Tensor:
        """Set bits by head, summed over batch and query blocks: int64 `[H]`, on the words' device."""
        bits = self.words.to(torch.int64) & 0xFFFFFFFF
        bits = bits - ((bits >> 1) & 0x55555555)
        bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F
        return (((bits * 0x01010101) & 0xFFFFFFFF) >> 24).sum(dim=(0, 2, 3))


def pack_mask(mask: Tensor) -> Tensor:
    """bool `[..., n]` -> int32 `[..., ceil(n / 32)]`, bit b of word w from element `32 * w + b`."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % MASK_WORD_BITS))
    bits = padded.reshape(*mask.shape[:-1], -1, MASK_WORD_BITS).to(torch.int64)
    words = (bits << torch.arange(MASK_WORD_BITS, device=mask.device)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_mask(words: Tensor, key_blocks: int) -> Tensor:
    """int32 `[..., w]` -> bool `[..., key_blocks]`, the inverse of `pack_mask`."""
    bits = words.unsqueeze(-1) >> torch.arange(MASK_WORD_BITS, dtype=torch.int32, device=words.device)
    return (bits & 1).to(torch.bool).flatten(-2)[..., :key_blocks]


def voting_rows(grid: BlockGrid, plan: HeadPlan, stride: int, index: int) -> range:
    """Rows of the call that are inspected for the `index`-th touched query block.

    Rows at absolute multiples of `stride`; all of them in blocks at or past `plan.unstrided_from`, and in a block where
    none would vote (a short append between two multiples).
    """
    start, end = grid.rows(index)
    if grid.block_start(index) >= plan.unstrided_from:
        return range(start, end)
    first_vote = start + -(grid.offset + start) % stride
    return range(first_vote, end, stride) if first_vote < end else range(start, end)


def select_blocks(
    query_codes: QueryCodes,
    key_codes: KeyCodes,
    thresholds: Tensor,
    plan: HeadPlan,
    grid: BlockGrid,
    kv: KvView,
) -> Selection:
    """Decide every selectable block; the oracle that other backends must equal bit for bit.

    Args:
        query_codes: codes `[B, H, Nq, d]`.
        key_codes: codes `[B, Hkv, Nk, d]`.
        thresholds: float32 `[B, H, Nq]`, see `sink_local.row_thresholds`.
        plan: strides by head; heads with stride 0 (dense, streaming) get no bits.
        grid: the blocks of this call.
        kv: contiguous exact keys, read with 4-bit codes only, for the correction of centred queries.

    Returns:
        The bitmask. Scratch memory is a few megabytes, whatever the length.
    """
    batch, heads, _, _ = query_codes.codes.shape
    shape = (batch, heads, grid.query_blocks, grid.mask_words)
    words = torch.zeros(shape, dtype=torch.int32, device=thresholds.device)
    group = heads // kv.kv_heads
    for kv_head in range(kv.kv_heads):
        members = range(kv_head * group, (kv_head + 1) * group)
        for stride in sorted({plan.strides[head] for head in members} - {0}):
            chosen = [head for head in members if plan.strides[head] == stride]
            for piece in _query_pieces(grid, plan, stride, len(chosen)):
                for row in range(batch):
                    part = _Piece(query_codes, key_codes, thresholds, grid, kv, row, kv_head, chosen, piece)
                    words[row, chosen, piece.first : piece.first + piece.rows.shape[0]] = pack_mask(part.mask())
    return Selection(words, grid.key_blocks)


@dataclass(frozen=True)
class _QueryPiece:
    """Neighbouring query blocks with equally many voting rows."""

    first: int
    rows: Tensor  # int64 [query blocks, voting rows]


def _query_pieces(grid: BlockGrid, plan: HeadPlan, stride: int, heads: int) -> Iterator[_QueryPiece]:
    index = 0
    while index < grid.query_blocks:
        votes = [voting_rows(grid, plan, stride, index)]
        limit = max(1, _PIECE_ROWS // (heads * len(votes[0])))
        while len(votes) < limit and index + len(votes) < grid.query_blocks:
            following = voting_rows(grid, plan, stride, index + len(votes))
            if len(following) != len(votes[0]):
                break
            votes.append(following)
        if grid.selectable(index + len(votes) - 1)[1] > grid.sink_blocks:
            yield _QueryPiece(index, torch.tensor([list(rows) for rows in votes]))
        index += len(votes)


class _Piece:
    """Some heads of one KV head, some query blocks, all their selectable key blocks."""

    def __init__(
        self,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        thresholds: Tensor,
        grid: BlockGrid,
        kv: KvView,
        batch: int,
        kv_head: int,
        heads: list[int],
        piece: _QueryPiece,
    ) -> None:
        self.grid, self.piece = grid, piece
        self.blocks, self.votes = piece.rows.shape
        self.heads = len(heads)
        device = thresholds.device
        where = (torch.tensor(heads, device=device).unsqueeze(1), piece.rows.flatten().to(device))
        self.codes = query_codes.codes[batch][where].flatten(0, 1)
        self.thresholds = thresholds[batch][where].flatten()
        self.key_codes = key_codes.codes[batch, kv_head]
        self.key_scales = key_codes.scales[batch, kv_head]
        self.means: Tensor | None = None
        if query_codes.block_means is not None:
            self.means = query_codes.block_means[batch, heads][:, piece.first : piece.first + self.blocks]
            self.query_scales = query_codes.scales[batch][where].flatten()
            self.keys = kv.keys_between(0, kv.tokens)[batch, kv_head]
            self.centre = key_codes.centre[batch, kv_head]

    def mask(self) -> Tensor:
        """bool `[heads, query blocks, key blocks]`."""
        grid = self.grid
        shape = (self.heads, self.blocks, grid.key_blocks)
        kept = torch.zeros(shape, dtype=torch.bool, device=self.codes.device)
        ends = [grid.selectable(self.piece.first + block)[1] for block in range(self.blocks)]
        for start in range(grid.sink_blocks, ends[-1], _PIECE_KEY_BLOCKS):
            end = min(start + _PIECE_KEY_BLOCKS, ends[-1])
            estimate = self._block_maxima(start, end)
            keep = ~(estimate <= self.thresholds.unsqueeze(1))
            kept[:, :, start:end] = keep.view(self.heads, self.blocks, self.votes, -1).any(dim=2)
        for block, end in enumerate(ends):
            kept[:, block, end:] = False
        return kept

    def estimates(self) -> Tensor:
        """float32 `[heads, votes, selectable key blocks]` of the only query block, to be compared with thresholds."""
        first, end = self.grid.selectable(self.piece.first)
        starts = range(first, end, _PIECE_KEY_BLOCKS)
        parts = [self._block_maxima(start, min(start + _PIECE_KEY_BLOCKS, end)) for start in starts]
        empty = self.thresholds.new_empty(self.thresholds.shape[0], 0)
        return torch.cat([empty, *parts], dim=1).view(self.heads, self.votes, -1)

    def _block_maxima(self, start: int, end: int) -> Tensor:
        """float32 `[heads * query blocks * votes, end - start]`, comparable with the thresholds."""
        size = self.grid.key_block
        products = code_products(self.codes, self.key_codes[start * size : end * size])
        products = products.view(products.shape[0], -1, size)
        if self.means is None:
            largest: Tensor = products.amax(dim=-1)
            return largest.to(torch.float32) * self.key_scales[start:end]
        pair_scales = self.query_scales.unsqueeze(1) * self.key_scales[start:end]
        estimates = products.to(torch.float32) * pair_scales.unsqueeze(2)
        keys = self.keys[start * size : end * size].to(torch.float32) - self.centre
        corrections = torch.repeat_interleave(self.means @ keys.t(), self.votes, dim=1)
        estimates += corrections.view_as(estimates)
        return estimates.amax(dim=-1)


def block_estimates(
    query_codes: QueryCodes, key_codes: KeyCodes, grid: BlockGrid, kv: KvView, batch: int, kv_head: int
) -> Tensor:
    """What `select_blocks` compares with the thresholds, for every threshold at once.

    Args:
        query_codes: codes of one query block's rows, `[B, H, Nq, d]`.
        key_codes: codes `[B, Hkv, Nk, d]`.
        grid: the blocks of these rows; one query block.
        kv: as in `select_blocks`.
        batch: which sequence.
        kv_head: whose query heads.

    Returns:
        float32 `[heads, Nq, selectable key blocks]`: block `grid.sink_blocks + b` is kept for row i of head h at
        threshold T where `not (estimate[h, i, b] <= T)`.
    """
    group = query_codes.codes.shape[1] // kv.kv_heads
    heads = list(range(kv_head * group, (kv_head + 1) * group))
    every_row = _QueryPiece(0, torch.arange(grid.query_tokens).unsqueeze(0))
    piece = _Piece(query_codes, key_codes, query_codes.scales, grid, kv, batch, kv_head, heads, every_row)
    return piece.estimates()


def code_products(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Exact inner products of int8 codes `[R, d]` and `[C, d]`: int32 or integral float32 `[R, C]`.

    float32 is exact as long as `d * 127^2 < 2^24`, that is up to `MAX_EXACT_HEAD_DIM`; bfloat16 or TF32 rounding of
    the operands, where a user allows it, cannot touch codes of at most 7 bits and a sign.
    """
    if _int8_matmul_is_exact(query_codes):
        products: Tensor = torch._int_mm(query_codes, key_codes.t())
        return products
    return query_codes.to(torch.float32) @ key_codes.to(torch.float32).t()


def _int8_matmul_is_exact(codes: Tensor) -> bool:
    # Three times the speed of float32. Without VNNI, oneDNN may add pairs of products with 16-bit saturation.
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return (
        codes.device.type == "cpu"
        and hasattr(torch, "_int_mm")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and supported is not None
        and bool(supported())
    )
