"""Sink-local pass: per row, the exact log-sum-exp of its sink and local scores, and the threshold that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import BlockGrid
from .kv_view import KvView
from .quantise import QueryCodes


def sink_local_log_sum_exp(query: Tensor, kv: KvView, centre: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    """Log-sum-exp over sink and local keys of `scale * q_i . (k_j - centre)`, the score in the centred space.

    That is L_i of the paper (section 3.3) less the constant `scale * q_i . centre`, which the estimated scores, made
    from centred keys, lack as well. Scores are float32 products of the exact inputs.

    Args:
        query: `[B, H, Nq, d]`, rows at the end of `kv`.
        kv: contiguous keys `[B, Hkv, Nk, d]`, H a multiple of Hkv.
        centre: float32 `[B, Hkv, d]`.
        grid: the blocks of this call.
        scale: softmax scale, 1 / sqrt(d) as a rule.

    Returns:
        float32 `[B, H, Nq]`, natural logarithm.
    """
    batch, heads, rows, _ = query.shape
    result = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    sink = _centred(kv, centre, 0, min(grid.sink_tokens, kv.tokens))
    # One query block at a time: the shapes of these products depend on absolute positions alone, so that the result
    # is the same to the last bit however the prompt is chunked.
    for index in range(grid.query_blocks):
        start, end = grid.rows(index)
        sink_end, local_start, local_end = grid.always_attended(index)
        first = local_start * grid.key_block
        last = min(local_end * grid.key_block, kv.tokens)
        keys = torch.cat([sink[:, :, : sink_end * grid.key_block], _centred(kv, centre, first, last)], dim=2)
        rows_of_block = query[:, :, start:end].to(torch.float32) * scale
        folded = rows_of_block.reshape(batch * kv.kv_heads, -1, query.shape[3])
        scores = torch.bmm(folded, keys.flatten(0, 1).transpose(1, 2)).view(batch, heads, end - start, -1)
        _mask_future(scores, grid.offset + start, last)
        result[:, :, start:end] = torch.logsumexp(scores, dim=-1)
    return result


def row_thresholds(log_sum_exp: Tensor, query_codes: QueryCodes, log_tau: Tensor, scale: float) -> Tensor:
    """Per row, the bound that the estimate of `select` must exceed: float32 `[B, H, Nq]`.

    A pair is kept if its estimated score exceeds `ln(tau_h) + L_i`. What is constant along a row moves to this side, in
    float32 with IEEE divisions and this order of operations:

        8-bit:  T_i = ((ln(tau_h) + L_i) / scale) / query_scale_i
        4-bit:  T_i = (ln(tau_h) + L_i) / scale

    (Two divisions, because `scale * query_scale` may be subnormal. With 4-bit codes the estimate holds a term that the
    query scale does not multiply, and a row that equals its block's mean has no scale to speak of.) tau = 0 gives
    -inf: keep everything.

    Args:
        log_sum_exp: float32 `[B, H, Nq]` from `sink_local_log_sum_exp`.
        query_codes: gives the row scales.
        log_tau: float32 `[H]`, `LayerPolicy.log_tau()`.
        scale: softmax scale.
    """
    log_tau = log_tau.to(log_sum_exp.device)[None, :, None]
    divisor = torch.full((), scale, dtype=torch.float32, device=log_sum_exp.device)
    thresholds = (log_tau + log_sum_exp) / divisor
    return thresholds if query_codes.block_means is not None else thresholds / query_codes.scales


def _centred(kv: KvView, centre: Tensor, start: int, end: int) -> Tensor:
    return kv.keys_between(start, end).to(torch.float32) - centre.unsqueeze(2)


def _mask_future(scores: Tensor, first_row: int, last_key: int) -> None:
    """Set to -inf the scores of keys after each row; the last columns of `scores` hold keys that end at `last_key`."""
    columns = last_key - first_row - 1
    if columns <= 0:
        return
    rows = torch.arange(scores.shape[-2], device=scores.device)
    keys = torch.arange(1, columns + 1, device=scores.device)
    scores[..., -columns:].masked_fill_(keys > rows.unsqueeze(1), float("-inf"))
