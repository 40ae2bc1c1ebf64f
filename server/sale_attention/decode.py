"""Decode attention: one query row a sequence, over keys whose number is known on the device only.

Unlike `attend`, nothing here depends on the host knowing how long a sequence is. So a captured CUDA graph of a decode
step serves every later step of its sequence, and one call serves sequences of different lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import AttentionResult
from .cuda import decode as native
from .kv_view import KvView

_KEY_PIECE = 4096


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """What a model's attention layers must know of a decode step beside their own keys and values.

    Attributes:
        lengths: int64 or int32 `[B]` on the model's device: keys of each sequence, the new one included.
        page_table: int64 `[B, pages]` where layers hold pages, as in `KvView`.
    """

    lengths: Tensor
    page_table: Tensor | None = None

    def view(self, keys: Tensor, values: Tensor) -> KvView:
        """One layer's keys and values up to their capacity."""
        if self.page_table is None:
            return KvView(keys, values)
        return KvView(keys, values, self.page_table, self.page_table.shape[1] * keys.shape[2])


def decode_attention(
    query: Tensor, kv: KvView, lengths: Tensor, *, scale: float | None = None, return_lse: bool = True
) -> AttentionResult:
    """Attention of one row a sequence over the first `lengths[b]` keys of its own.

    Runs on native kernels on CUDA devices from compute capability 8.0 in bfloat16 and float16 at head_dim 64 and 128
    (see `has_decode_kernel`), else on torch operations that read all of `kv`, many times slower. Either way the host
    waits for nothing, and what lies behind a length (NaN too) does not matter.

    Args:
        query: `[B, H, 1, d]`, H a multiple of the KV heads.
        kv: keys and values; `kv.tokens` is what a sequence can have at most, not what it has. Entries of a page table
            behind a sequence's last page may be anything.
        lengths: int64 or int32 `[B]` on the query's device; a sequence of length 0 gets zeros, log-sum-exp -inf.
        scale: softmax scale, default 1 / sqrt(d).
        return_lse: False leaves `lse` out.

    Returns:
        Output `[B, H, 1, d_v]` in the query's dtype, and log-sum-exp float32 `[B, H, 1]`.

    Raises:
        ValueError: for tensors that do not fit together, naming them.
    """
    _check(query, kv, lengths)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    if native.covers(query, kv):
        output, lse = native.decode(query, kv, lengths, scale, return_lse)
    else:
        output, lse = _reference(query, kv, lengths, scale)
    return AttentionResult(output, lse if return_lse else None)


def has_decode_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `decode_attention` runs natively there, for keys whose rows start at multiples of 16 bytes.

    The first question may build the kernels.
    """
    return native.is_available(device, dtype, head_dim)


def _check(query: Tensor, kv: KvView, lengths: Tensor) -> None:
    batch, heads = query.shape[:2]
    if query.ndim != 4 or query.shape[2] != 1 or query.shape[3] != kv.head_dim or heads % kv.kv_heads:
        raise ValueError(
            f"query {tuple(query.shape)} must be [batch, heads, 1, {kv.head_dim}], heads a multiple of {kv.kv_heads}"
        )
    if batch != kv.batch or query.dtype != kv.dtype or query.device != kv.device:
        raise ValueError(
            f"query: {batch} sequences, {query.dtype} on {query.device}; keys: {kv.batch}, {kv.dtype} on {kv.device}; "
            f"they must agree"
        )
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int64, torch.int32) or lengths.device != query.device:
        raise ValueError(
            f"lengths are {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}; they must be int64 or int32 "
            f"[{batch}] on {query.device}"
        )


def _reference(query: Tensor, kv: KvView, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Online softmax over pieces of the keys, in float32 or wider."""
    batch, heads, _, head_dim = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    if kv.page_table is not None:
        kv = KvView(kv.keys, kv.values, kv.page_table.clamp(0, kv.keys.shape[0] - 1), kv.length)
    rows = query.to(work).reshape(batch, kv.kv_heads, -1, head_dim) * scale
    lse = rows.new_full((*rows.shape[:3], 1), float("-inf"))
    output = rows.new_zeros(*rows.shape[:3], kv.value_dim)
    for start in range(0, kv.tokens, _KEY_PIECE):
        end = min(start + _KEY_PIECE, kv.tokens)
        hidden = (torch.arange(start, end, device=query.device) >= lengths.unsqueeze(1)).view(batch, 1, 1, -1)
        keys = kv.keys_between(start, end).to(work)
        values = kv.values_between(start, end).to(work).masked_fill(hidden.transpose(2, 3), 0.0)
        scores = (rows @ keys.transpose(2, 3)).masked_fill(hidden, float("-inf"))
        joint = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
        base = joint.masked_fill(joint == float("-inf"), 0.0)
        output = output * (lse - base).exp() + (scores - base).exp() @ values
        lse = joint
    shape = (batch, heads, 1)
    return output.reshape(*shape, -1).to(query.dtype), lse.reshape(shape).to(torch.float32)
