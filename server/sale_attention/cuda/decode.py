"""The native decode kernel (`csrc/cuda/decode.cu`): what it covers, scratch memory, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from sale_attention.cuda import abi, library
from sale_attention.kv_view import KvView

#: A sequence is cut into chunks of at least this many tokens: a chunk leaves a partial output in memory.
_LEAST_CHUNK = 128
#: Chunks over all KV heads of one long sequence: about one for each warp that fits a large GPU.
_CHUNKS = 1024
_SPLITS = (32, 1024)


def is_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel: CUDA from 8.0, 16-bit elements, head_dim 64 or 128."""
    return library.kernels_for(device, dtype, head_dim) is not None


def covers(query: Tensor, kv: KvView) -> bool:
    """Whether the kernel runs this call: there is one, and rows start at multiples of 16 bytes."""
    fits = kv.value_dim == kv.head_dim and kv.tokens < 2**31 and abi.is_aligned(kv.keys) and abi.is_aligned(kv.values)
    return fits and is_available(query.device, query.dtype, kv.head_dim)


def decode(query: Tensor, kv: KvView, lengths: Tensor, scale: float, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """See `sale_attention.decode.decode_attention`; only for what `covers` says.

    Raises:
        RuntimeError: the launch failed; names the CUDA error.
    """
    native = library.library_for(query.device)
    assert native is not None
    query, lengths = query.contiguous(), lengths.contiguous()
    if query.data_ptr() % 16:
        query = query.clone()
    batch, heads, _, head_dim = query.shape
    splits = splits_of(kv.tokens, kv.kv_heads)
    output = torch.empty_like(query)
    lse = query.new_empty(batch, heads, 1, dtype=torch.float32) if return_lse else None
    partial = query.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
    partial_lse = query.new_empty(batch, heads, splits, dtype=torch.float32)
    call = (
        *abi.rows_of(query),
        *abi.tokens_of(kv.keys, kv.page_table, kv.tokens),
        *abi.tokens_of(kv.values, kv.page_table, kv.tokens),
        *abi.rows_of(output),
        abi.pointer(lse),
        lengths.data_ptr(),
        partial.data_ptr(),
        partial_lse.data_ptr(),
        kv.tokens,
        batch,
        heads,
        kv.kv_heads,
        head_dim,
        abi.DTYPES[query.dtype],
        lengths.dtype == torch.int64,
        splits,
        _LEAST_CHUNK,
        library.multiprocessors(query.device),
        scale,
    )
    library.call(native, "decode", call, query.device)
    return output, lse


def splits_of(capacity: int, kv_heads: int) -> int:
    """Most chunks of a sequence.

    A sequence is cut the same whatever its capacity: where the capacity decides here, all chunks have the least size.
    """
    least, most = _SPLITS
    return min(-(-capacity // _LEAST_CHUNK), max(least, min(most, _CHUNKS // kv_heads)))
