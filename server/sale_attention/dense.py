"""Dense causal attention through torch's SDPA, with `Nq != Nk`, in memory linear in the sequence.

SDPA's causal flag aligns the mask to the upper left, so rows behind a prefix (`1 < Nq < Nk`) need something else.
Measured on 2 cores (Zen 4, torch 2.13, bf16, 9 query / 3 KV heads, head_dim 64, rows 6144-8191 of 8192):

    pieces of 512 / 1024 / 2048 rows, each with its own boolean mask    0.27 / 0.25 / 0.29 s
    prefix without mask + causal chunk, merged by log-sum-exp           0.23 s

The masked pieces are taken although the merge is a tenth faster: their rows equal those of one causal call over the
whole prompt but for a few outputs in 100,000 (the merge changes 39 % of the bf16 outputs by a rounding), so that
greedy tokens do not depend on the chunking. Decode (`Nq == 1`) goes through SDPA row by row as well. Folding a KV
head's query heads into rows of one product is six times faster on the CPU (2 against 13 ms a layer at 8K), but sums in
another order, and over real text that turns exact ties of bf16 logits: greedy tokens would differ from transformers'
own (seen at 3000 and 5000 tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from .kv_view import KvView

_ROW_PIECE = 1024
_MASK_ELEMENTS = 1 << 25
_LSE_ROW_PIECE = 256
_LSE_KEY_PIECE = 4096


def dense_attention(query: Tensor, kv: KvView, *, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of `query`, rows at the end of `kv`, over all keys or the last `window` ones.

    Args:
        query: `[B, H, Nq, d]`, H a multiple of the KV heads, `Nq <= Nk`.
        kv: keys and values; pages are gathered.
        scale: softmax scale.
        window: if given, row i sees keys j with `i - window < j <= i`, as in transformers' sliding window.

    Returns:
        `[B, H, Nq, d_v]` in the query's dtype.
    """
    kv = kv.gathered()
    query_tokens, tokens = query.shape[2], kv.tokens
    keys, values = kv.keys_between(0, tokens), kv.values_between(0, tokens)
    value_dim = values.shape[3]
    if value_dim < kv.head_dim:
        # Unequal sizes would send SDPA to its math path, which holds all scores.
        values = pad(values, (0, kv.head_dim - value_dim))
    if window is not None and window < tokens:
        output = _masked_pieces(query, keys, values, scale, window)
    elif query_tokens in (1, tokens):
        output = _grouped(query, keys, values, scale, is_causal=query_tokens > 1)
    elif query.device.type == "cuda":
        output = _lower_right(query, keys, values, scale)
    else:
        output = _masked_pieces(query, keys, values, scale, None)
    return output[..., :value_dim]


def dense_log_sum_exp(query: Tensor, kv: KvView, *, scale: float, window: int | None = None) -> Tensor:
    """Natural log-sum-exp of each row's causal scores: float32 `[B, H, Nq]`.

    A pass of its own over the scores, in bounded pieces (half the work of dense attention), because torch's public
    SDPA does not return it; ask for it only where it is used.
    """
    kv = kv.gathered()
    batch, heads, rows, _ = query.shape
    offset = kv.tokens - rows
    result = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    for start in range(0, rows, _LSE_ROW_PIECE):
        end = min(start + _LSE_ROW_PIECE, rows)
        folded = (query[:, :, start:end].to(torch.float32) * scale).reshape(batch, kv.kv_heads, -1, query.shape[3])
        pieces = []
        first = 0 if window is None else max(0, offset + start - window + 1)
        for key_start in range(first, offset + end, _LSE_KEY_PIECE):
            key_end = min(key_start + _LSE_KEY_PIECE, offset + end)
            keys = kv.keys_between(key_start, key_end).to(torch.float32)
            scores = (folded @ keys.transpose(2, 3)).view(batch, heads, end - start, -1)
            mask = _causal_mask(offset + start, offset + end, key_start, key_end, window, query.device)
            pieces.append(torch.logsumexp(scores.masked_fill_(~mask, float("-inf")), dim=-1))
        result[:, :, start:end] = torch.logsumexp(torch.stack(pieces), dim=0)
    return result


def _grouped(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """SDPA with keys and values shared by a group of query heads, never repeated in memory."""
    groups = query.shape[1] // keys.shape[1]
    if query.device.type == "cuda":
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
        )
    # KV heads join the batch; the group dimension of keys and values has stride 0, which the CPU kernel reads in place.
    folded = query.reshape(-1, groups, *query.shape[2:])
    shared_keys = keys.reshape(-1, 1, *keys.shape[2:]).expand(-1, groups, -1, -1)
    shared_values = values.reshape(-1, 1, *values.shape[2:]).expand(-1, groups, -1, -1)
    output = scaled_dot_product_attention(
        folded, shared_keys, shared_values, attn_mask=mask, is_causal=is_causal, scale=scale
    )
    return output.view(*query.shape[:3], -1)


def _lower_right(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """CUDA's fused kernels align causality to the lower right by themselves: no mask in memory."""
    bias = causal_lower_right(query.shape[2], keys.shape[2])
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )


def _masked_pieces(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    query_tokens, tokens = query.shape[2], keys.shape[2]
    offset = tokens - query_tokens
    piece = _ROW_PIECE if _ROW_PIECE * tokens <= _MASK_ELEMENTS else _ROW_PIECE // 2
    output = query.new_empty(*query.shape[:3], values.shape[3])
    for start in range(0, query_tokens, piece):
        end = min(start + piece, query_tokens)
        first, last = offset + start, offset + end
        key_start = 0 if window is None else max(0, first - window + 1)
        mask = _causal_mask(first, last, key_start, last, window, query.device)
        output[:, :, start:end] = _grouped(
            query[:, :, start:end], keys[:, :, key_start:last], values[:, :, key_start:last], scale, mask
        )
    return output


def _causal_mask(
    row_start: int, row_end: int, key_start: int, key_end: int, window: int | None, device: torch.device
) -> Tensor:
    """bool `[rows, keys]` over absolute positions: True where the row sees the key."""
    rows = torch.arange(row_start, row_end, device=device).unsqueeze(1)
    keys = torch.arange(key_start, key_end, device=device)
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)
