"""The quantiser, pinned so that every backend's codes agree bit for bit.

All arithmetic is float32 from the input, whatever its dtype, every division is IEEE division (no reciprocal, no fused
multiply-add), in this order:

    y     = float32(x) - centre                          (8-bit queries: y = float32(x))
    y     = hadamard(y)                                  (4-bit only)
    amax  = max |y| over the group; NaN propagates
    scale = max(amax / limit, FLT_MIN); NaN propagates   limit = 127 (8-bit) or 7 (4-bit)
    code  = clamp(round_half_to_even(y / scale), -limit, limit); a NaN quotient becomes 0

A group is one row of Q, or one 32-key block of one head of K (SageAttention2-style fine-grained scales, chosen for
the integer compare of `select`). So a non-finite element makes its group's scale NaN or inf, which `select` turns into
"keep"; it never hides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import SaleConfig
from .geometry import BlockGrid
from .kv_view import KvView

_PIECE_TOKENS = 4096
_FLOAT32_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class QueryCodes:
    """Quantised queries of one call.

    Attributes:
        codes: int8 `[B, H, Nq, d]`.
        scales: float32 `[B, H, Nq]`.
        block_means: float32 `[B, H, query blocks, d]`, what was subtracted from the rows of each query block
            (4-bit); None with 8-bit codes, where queries are not centred.
    """

    codes: Tensor
    scales: Tensor
    block_means: Tensor | None = None


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """Quantised keys of one layer: a side buffer that can always be recomputed from the keys and the centre.

    Attributes:
        codes: int8 `[B, Hkv, >= Nk, d]`, or with a page table `[pages, Hkv, page_tokens, d]`.
        scales: float32 `[B, Hkv, >= ceil(Nk / 32)]`, or `[pages, Hkv, page_tokens / 32]`.
        centre: float32 `[B, Hkv, d]`, what was subtracted from the keys.
        page_table: int64 `[B, pages per sequence]` or None, as in `KvView`; a page is a multiple of 32 tokens.
    """

    codes: Tensor
    scales: Tensor
    centre: Tensor
    page_table: Tensor | None = None

    def gathered(self, tokens: int, key_block: int = 32) -> KeyCodes:
        """The codes of the first `tokens` tokens without page table: views where contiguous, else copies."""
        blocks = -(-tokens // key_block)
        if self.page_table is None:
            return KeyCodes(self.codes[:, :, :tokens], self.scales[:, :, :blocks], self.centre)
        page_tokens = self.codes.shape[2]
        table = self.page_table[:, : -(-tokens // page_tokens)]
        codes = self.codes[table].transpose(1, 2).flatten(2, 3)
        scales = self.scales[table].transpose(1, 2).flatten(2, 3)
        return KeyCodes(codes[:, :, :tokens], scales[:, :, :blocks], self.centre)


class KeyExtension(NamedTuple):
    """What is to be written to a session's key codes before rows at the end of its keys can use them.

    Attributes:
        codes: all codes, with room for the new keys; `centre` is there unless it is to be computed.
        start: first token to quantise, a multiple of 32.
        centre_tokens: the centre is the mean of that many first keys, to be computed; 0: it is there.
    """

    codes: KeyCodes
    start: int
    centre_tokens: int


def default_key_centre(kv: KvView, config: SaleConfig) -> Tensor:
    """Mean of the keys at positions 0 .. centre_tokens - 1 (or of all, where there are fewer): float32 `[B, Hkv, d]`.

    Summed in float64 and rounded once, so that threads and memory layout do not show in the result.
    """
    count = min(config.centre_tokens, kv.tokens)
    return kv.keys_between(0, count).to(torch.float64).mean(dim=2).to(torch.float32)


def query_block_means(query: Tensor, grid: BlockGrid) -> Tensor:
    """Mean over the rows present in each query block: `[B, H, Nq, d]` -> float32 `[B, H, query blocks, d]`.

    By absolute position, so a chunked prompt gives the same means. Summed in float64 and rounded once.
    """
    means = [
        query[:, :, start:end].to(torch.float64).mean(dim=2)
        for start, end in (grid.rows(index) for index in range(grid.query_blocks))
    ]
    return torch.stack(means, dim=2).to(torch.float32)


def quantise_query(query: Tensor, grid: BlockGrid, config: SaleConfig, block_means: Tensor | None = None) -> QueryCodes:
    """Quantise `[B, H, Nq, d]` by row. `block_means` (4-bit only) defaults to `query_block_means(query, grid)`."""
    rows = query.to(torch.float32)
    if config.code_bits == 4:
        if block_means is None:
            block_means = query_block_means(query, grid)
        counts = [end - start for start, end in (grid.rows(index) for index in range(grid.query_blocks))]
        repeats = torch.tensor(counts, device=query.device)
        rows = rows - torch.repeat_interleave(block_means, repeats, dim=2, output_size=grid.query_tokens)
        rows = hadamard_transform(rows)
    codes, scales = quantise_groups(rows, rows.abs().amax(dim=-1), config.code_limit)
    return QueryCodes(codes, scales, block_means if config.code_bits == 4 else None)


def quantise_key_range(kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
    """Quantise keys of positions `[start, Nk)` into `out`, centred by `out.centre`; `start` is a multiple of 32.

    Works through pieces of a few thousand keys, so its scratch memory does not grow with the sequence.
    """
    block = config.key_block
    piece_tokens = _PIECE_TOKENS if out.page_table is None else out.codes.shape[2]
    for piece in range(start // piece_tokens * piece_tokens, kv.tokens, piece_tokens):
        first, end = max(piece, start), min(piece + piece_tokens, kv.tokens)
        keys = kv.keys_between(first, end).to(torch.float32) - out.centre.unsqueeze(2)
        if config.code_bits == 4:
            keys = hadamard_transform(keys)
        # Padding with zeros cannot raise a maximum of magnitudes.
        padded = torch.nn.functional.pad(keys, (0, 0, 0, -(end - first) % block))
        groups = padded.reshape(kv.batch, kv.kv_heads, -1, block * kv.head_dim)
        codes, scales = quantise_groups(groups, groups.abs().amax(dim=-1), config.code_limit)
        rows = codes.view(padded.shape)[:, :, : end - first]
        if out.page_table is None:
            out.codes[:, :, first:end] = rows
            out.scales[:, :, first // block : -(-end // block)] = scales
        else:
            pages = out.page_table[:, piece // piece_tokens]
            out.codes[pages, :, first - piece : end - piece] = rows
            out.scales[pages, :, (first - piece) // block : -(-(end - piece) // block)] = scales


def quantise_key(kv: KvView, centre: Tensor, config: SaleConfig) -> KeyCodes:
    """Quantise all keys of `kv` from scratch, centred by `centre` float32 `[B, Hkv, d]`."""
    codes = torch.empty(kv.batch, kv.kv_heads, kv.tokens, kv.head_dim, dtype=torch.int8, device=kv.device)
    blocks = -(-kv.tokens // config.key_block)
    scales = torch.empty(kv.batch, kv.kv_heads, blocks, dtype=torch.float32, device=kv.device)
    result = KeyCodes(codes, scales, centre)
    quantise_key_range(kv, config, 0, result)
    return result


def quantise_groups(values: Tensor, amax: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The pinned scale and code: float32 `values [..., n]`, `amax [...]` -> int8 codes `[..., n]`, scales `[...]`."""
    # A device tensor, not a Python number: CUDA would multiply by the reciprocal of a number, which rounds differently.
    divisor = torch.full((), float(limit), dtype=torch.float32, device=values.device)
    scales = torch.clamp(amax / divisor, min=_FLOAT32_TINY)
    quotient = torch.nan_to_num(values / scales.unsqueeze(-1), nan=0.0, posinf=float(limit), neginf=-float(limit))
    return quotient.round_().clamp_(-limit, limit).to(torch.int8), scales


def hadamard_transform(values: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, float32, in a pinned order of additions.

    A head_dim d that is no power of two is rotated in independent blocks of its largest power-of-two divisor n
    (96 -> three blocks of 32). Butterfly stages run with half-width 1, 2, 4, ..., n / 2, each (a + b, a - b); the
    last step multiplies by float32(1 / sqrt(n)).
    """
    size = values.shape[-1] & -values.shape[-1]
    result = values.to(torch.float32)
    half = 1
    while half < size:
        first, second = result.reshape(*values.shape[:-1], -1, 2, half).unbind(-2)
        result = torch.stack((first + second, first - second), dim=-2).view(values.shape)
        half *= 2
    return result * (1.0 / math.sqrt(size))
