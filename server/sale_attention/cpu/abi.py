"""ctypes mirror of `csrc/include/sale_prefill/cpu_api.h`, field by field; change both, and `ABI`, together."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

ABI = 2
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}


class Tokens(ctypes.Structure):
    """SaleTokens: keys, values or codes, contiguous or paged."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("page_table", c_void_p),
        ("page_table_stride", c_int64),
        ("page_table_step", c_int64),
        ("page_tokens", c_int64),
        ("dtype", c_int32),
    ]

    @classmethod
    def of(cls, tensor: Tensor, page_table: Tensor | None) -> Tokens:
        """`[B, Hkv, tokens, ...]` or, with a page table, `[pages, Hkv, page_tokens, ...]`."""
        batch_stride, head_stride, token_stride = tensor.stride()[:3]
        table: tuple[int | None, ...] = (None, 0, 0, 0)
        if page_table is not None:
            table = (page_table.data_ptr(), *page_table.stride(), tensor.shape[2])
        return cls(tensor.data_ptr(), batch_stride, head_stride, token_stride, *table, DTYPES[tensor.dtype])


class Rows(ctypes.Structure):
    """SaleRows: query or output `[B, H, Nq, d]`."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("row_stride", c_int64),
        ("dtype", c_int32),
    ]

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """`[B, H, Nq, d]` with a contiguous last dimension."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3], DTYPES[tensor.dtype])


class Grid(ctypes.Structure):
    """SaleGrid."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "rows", "offset", "query_block")),
        *((name, c_int64) for name in ("sink_blocks", "local_tokens", "head_dim", "value_dim")),
        ("threads", c_int32),
    ]


class QuantiseQuery(ctypes.Structure):
    """SaleQuantiseQuery."""

    _fields_ = [("grid", Grid), ("query", Rows), ("codes", c_void_p), ("scales", c_void_p)]


class QuantiseKey(ctypes.Structure):
    """SaleQuantiseKey."""

    _fields_ = [
        ("grid", Grid),
        ("keys", Tokens),
        ("codes", Tokens),
        ("scales", Tokens),
        ("centre", c_void_p),
        ("start", c_int64),
    ]


class SinkLocal(ctypes.Structure):
    """SaleSinkLocal."""

    _fields_ = [
        ("grid", Grid),
        ("query", Rows),
        ("keys", Tokens),
        ("centre", c_void_p),
        ("lse", c_void_p),
        ("scale", c_float),
    ]


class Sampled(ctypes.Structure):
    """SaleSampled."""

    _fields_ = [
        ("grid", Grid),
        ("query_codes", c_void_p),
        ("query_scales", c_void_p),
        ("key_codes", Tokens),
        ("key_scales", Tokens),
        ("strides", c_void_p),
        ("unstrided_from", c_int64),
        ("sample_stride", c_int64),
        ("lse", c_void_p),
        ("scale", c_float),
    ]


class Select(ctypes.Structure):
    """SaleSelect."""

    _fields_ = [
        ("grid", Grid),
        ("query_codes", c_void_p),
        ("key_codes", Tokens),
        ("key_scales", Tokens),
        ("thresholds", c_void_p),
        ("strides", c_void_p),
        ("unstrided_from", c_int64),
        ("words", c_void_p),
        ("mask_words", c_int64),
    ]


class Attend(ctypes.Structure):
    """SaleAttend."""

    _fields_ = [
        ("grid", Grid),
        ("query", Rows),
        ("keys", Tokens),
        ("values", Tokens),
        ("words", c_void_p),
        ("mask_words", c_int64),
        ("skip_heads", c_void_p),
        ("output", Rows),
        ("lse", c_void_p),
        ("lse_batch_stride", c_int64),
        ("lse_head_stride", c_int64),
        ("scale", c_float),
    ]


CALLS: dict[str, type[ctypes.Structure]] = {
    "quantise_query": QuantiseQuery,
    "quantise_key": QuantiseKey,
    "sink_local": SinkLocal,
    "sampled": Sampled,
    "select": Select,
    "attend": Attend,
}


def declare(library: ctypes.CDLL) -> None:
    """Gives the library's functions their types.

    Raises:
        RuntimeError: the library was built from another version of the header.
    """
    if library.sale_cpu_abi() != ABI:
        raise RuntimeError(f"the kernel library speaks ABI {library.sale_cpu_abi()}, this package {ABI}")
    library.sale_cpu_isa_name.restype = ctypes.c_char_p
    for name, structure in CALLS.items():
        getattr(library, f"sale_cpu_{name}").argtypes = [c_int32, POINTER(structure)]
