"""An O(N^2) oracle in numpy and float64, written from the design document and sharing no code with the library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sale_attention import BlockGrid, HeadPlan, KeyCodes, KvView, LayerPolicy, QueryCodes, SaleConfig

SMALL = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64)


@dataclass(frozen=True)
class Shape:
    """One attention problem."""

    rows: int
    offset: int = 0
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    batch: int = 1

    @property
    def tokens(self) -> int:
        return self.rows + self.offset


def random_problem(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, KvView]:
    """Queries and keys with a few strong matches far away, so that some blocks are kept and most are not.

    Elements are multiples of 1/8 and small, so that float32 sums of their products are exact in any order.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 8).round().clamp(-24, 24) / 8

    query = normal(shape.batch, shape.heads, shape.rows, shape.head_dim)
    keys = normal(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim) + 0.5
    values = normal(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    group = shape.heads // shape.kv_heads
    for _ in range(max(1, shape.rows // 24)):
        row = int(torch.randint(shape.rows, (), generator=generator))
        head = int(torch.randint(shape.heads, (), generator=generator))
        key = int(torch.randint(shape.offset + row + 1, (), generator=generator))
        keys[:, head // group, key] = query[:, head, row]
    return query.to(dtype), KvView(keys.to(dtype), values.to(dtype))


def naive_selection(
    query_codes: QueryCodes,
    key_codes: KeyCodes,
    thresholds: Tensor,
    strides: tuple[int, ...],
    unstrided_from: int,
    shape: Shape,
    config: SaleConfig,
    keys: Tensor | None = None,
) -> np.ndarray:
    """Kept blocks, bool `[B, H, query blocks, key blocks]`, one (row, key block) after the other."""
    first_block = shape.offset // config.query_block
    query_blocks = (shape.tokens - 1) // config.query_block - first_block + 1
    key_blocks = -(-shape.tokens // 32)
    kept = np.zeros((shape.batch, shape.heads, query_blocks, key_blocks), dtype=bool)
    for batch in range(shape.batch):
        for head in range(shape.heads):
            kv_head = head * shape.kv_heads // shape.heads
            codes = key_codes.codes[batch, kv_head].numpy().astype(np.int32)
            scales = key_codes.scales[batch, kv_head].numpy()
            for row in voting_rows(shape, strides[head], unstrided_from, config.query_block):
                index = (shape.offset + row) // config.query_block - first_block
                start = (first_block + index) * config.query_block
                products = codes @ query_codes.codes[batch, head, row].numpy().astype(np.int32)
                key_scales = np.repeat(scales, 32)[: shape.tokens]
                estimates = products.astype(np.float32) * key_scales
                if query_codes.block_means is not None:
                    assert keys is not None
                    centred = keys[batch, kv_head].float().numpy() - key_codes.centre[batch, kv_head].numpy()
                    correction = centred @ query_codes.block_means[batch, head, index].numpy()
                    pair_scales = key_scales * query_codes.scales[batch, head, row].numpy()
                    estimates = products.astype(np.float32) * pair_scales + correction
                bound = thresholds[batch, head, row].numpy()
                local_start = max(0, start - config.local_tokens) // 32
                for block in range(config.sink_tokens // 32, local_start):
                    below = estimates[block * 32 : block * 32 + 32].max() <= bound
                    kept[batch, head, index, block] |= not below
    return kept


def voting_rows(shape: Shape, stride: int, unstrided_from: int, query_block: int) -> list[int]:
    """Rows whose estimate counts, by the rules of `query_stride`."""
    if stride == 0:
        return []
    positions = range(shape.offset, shape.tokens)
    chosen = []
    for position in positions:
        start = position // query_block * query_block
        mates = [p for p in range(start, start + query_block) if p in positions]
        nobody_votes = not any(p % stride == 0 for p in mates)
        if position % stride == 0 or start >= unstrided_from or nobody_votes:
            chosen.append(position - shape.offset)
    return chosen


def attended(kept: np.ndarray, shape: Shape, config: SaleConfig) -> np.ndarray:
    """bool `[B, H, Nq, Nk]`: which keys a row attends to, given the kept blocks."""
    mask = np.zeros((shape.batch, shape.heads, shape.rows, shape.tokens), dtype=bool)
    first_block = shape.offset // config.query_block
    for row in range(shape.rows):
        position = shape.offset + row
        block = position // config.query_block
        local_start = max(0, block * config.query_block - config.local_tokens) // 32 * 32
        chosen = np.repeat(kept[:, :, block - first_block], 32, axis=-1)[..., : shape.tokens].copy()
        chosen[..., : config.sink_tokens] = True
        chosen[..., local_start:] = True
        chosen[..., position + 1 :] = False
        mask[:, :, row] = chosen
    return mask


def exact_attention(query: Tensor, kv: KvView, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and log-sum-exp in float64 under a mask bool `[B, H, Nq, Nk]` (or broadcastable)."""
    group = query.shape[1] // kv.kv_heads
    keys = kv.keys_between(0, kv.tokens).double().repeat_interleave(group, dim=1)
    values = kv.values_between(0, kv.tokens).double().repeat_interleave(group, dim=1)
    scores = (query.double() @ keys.transpose(2, 3)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ values, torch.logsumexp(scores, dim=-1)


def causal_mask(shape: Shape, window: int | None = None) -> Tensor:
    """bool `[Nq, Nk]`."""
    rows = torch.arange(shape.offset, shape.tokens).unsqueeze(1)
    keys = torch.arange(shape.tokens)
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)


def plan_for(shape: Shape, tau: list[float] | float = 0.1, stride: list[int] | int = 1) -> tuple[LayerPolicy, HeadPlan]:
    """A policy with `tau` and `stride` (one value or one a head), resolved for `SMALL` and a prompt that ends here."""
    taus = tau if isinstance(tau, list) else [tau] * shape.heads
    strides = stride if isinstance(stride, list) else [stride] * shape.heads
    policy = LayerPolicy(tau=torch.tensor(taus), query_stride=torch.tensor(strides))
    return policy, HeadPlan.resolve(policy, SMALL, shape.tokens)


def grid_of(shape: Shape, config: SaleConfig = SMALL) -> BlockGrid:
    """The block grid of a shape."""
    return BlockGrid.of(shape.rows, shape.tokens, config)
