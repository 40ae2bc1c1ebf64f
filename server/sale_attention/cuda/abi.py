"""ctypes mirror of `csrc/include/sale_prefill/cuda_api.h`, field by field; change both, and `ABI`, together."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

ABI = 5


#: SaleCudaDtype.
DTYPES = {torch.bfloat16: 0, torch.float16: 1}


def is_aligned(tensor: Tensor) -> bool:
    """Whether kernels and the copy engine can read it: rows contiguous, start and strides multiples of 16 bytes."""
    unit, head, token, element = tensor.stride()
    return element == 1 and (tensor.data_ptr() | (unit | head | token) * tensor.element_size()) % 16 == 0


class Tokens(ctypes.Structure):
    """SaleCudaTokens: keys, values or codes, contiguous or paged."""

    _fields_ = [
        ("data", c_void_p),
        ("unit_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("units", c_int64),
        ("unit_tokens", c_int64),
        ("page_table", c_void_p),
        ("page_table_stride", c_int64),
        ("page_table_step", c_int64),
    ]

    @classmethod
    def of(cls, tensor: Tensor, page_table: Tensor | None, tokens: int) -> Tokens:
        """`[B, Hkv, >= tokens, ...]`, or with a page table `[pages, Hkv, page_tokens, ...]`."""
        strides = tensor.stride()[:3]
        if page_table is None:
            return cls(tensor.data_ptr(), *strides, tensor.shape[0], tokens, None, 0, 0)
        return cls(
            tensor.data_ptr(),
            *strides,
            tensor.shape[0],
            tensor.shape[2],
            page_table.data_ptr(),
            *page_table.stride(),
        )


class Rows(ctypes.Structure):
    """SaleCudaRows: query or output `[B, H, Nq, d]`."""

    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64), ("row_stride", c_int64)]

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """`[B, H, Nq, d]` with a contiguous last dimension."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class Grid(ctypes.Structure):
    """SaleCudaGrid."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("rows", "offset")),
        *((name, c_int32) for name in ("query_block", "sink_blocks", "local_tokens", "multiprocessors", "dtype")),
    ]


class KeyCentre(ctypes.Structure):
    """SaleCudaKeyCentre."""

    _fields_ = [("grid", Grid), ("keys", Tokens), ("centre", c_void_p), ("tokens", c_int64)]


class QuantiseKey(ctypes.Structure):
    """SaleCudaQuantiseKey."""

    _fields_ = [
        ("grid", Grid),
        ("keys", Tokens),
        ("codes", Tokens),
        ("scales", Tokens),
        ("centre", c_void_p),
        ("start", c_int64),
    ]


class QueryRows(ctypes.Structure):
    """SaleCudaQueryRows."""

    _fields_ = [
        ("grid", Grid),
        ("query", Rows),
        ("keys", Tokens),
        ("centre", c_void_p),
        ("log_tau", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("lse", c_void_p),
        ("thresholds", c_void_p),
        ("scale", c_float),
    ]


class Select(ctypes.Structure):
    """SaleCudaSelect."""

    _fields_ = [
        ("grid", Grid),
        ("query_codes", c_void_p),
        ("key_codes", Tokens),
        ("key_scales", Tokens),
        ("thresholds", c_void_p),
        ("strides", POINTER(c_int32)),
        ("unstrided_from", c_int64),
        ("words", c_void_p),
        ("mask_words", c_int64),
    ]


class Attend(ctypes.Structure):
    """SaleCudaAttend."""

    _fields_ = [
        ("grid", Grid),
        ("query", Rows),
        ("keys", Tokens),
        ("values", Tokens),
        ("words", c_void_p),
        ("mask_words", c_int64),
        ("dense_until", c_int64),
        ("skip_heads", c_void_p),
        ("output", Rows),
        ("lse", c_void_p),
        ("lse_batch_stride", c_int64),
        ("lse_head_stride", c_int64),
        ("scale", c_float),
        ("next_work", c_void_p),
    ]


class Layer(ctypes.Structure):
    """SaleCudaLayer."""

    _fields_ = [
        ("grid", Grid),
        ("query", Rows),
        ("output", Rows),
        *((name, Tokens) for name in ("keys", "values", "key_codes", "key_scales")),
        ("centre", c_void_p),
        *((name, c_int64) for name in ("centre_tokens", "start", "dense_until")),
        ("log_tau", c_void_p),
        ("strides", POINTER(c_int32)),
        ("skip_heads", c_void_p),
        ("unstrided_from", c_int64),
        *((name, c_void_p) for name in ("query_codes", "thresholds", "words", "next_work")),
        ("mask_words", c_int64),
        ("kept", c_void_p),
        ("lse", c_void_p),
        ("lse_batch_stride", c_int64),
        ("lse_head_stride", c_int64),
        ("scale", c_float),
        ("events", c_void_p * 5),
    ]


class QuantiseQuery4(ctypes.Structure):
    """SaleCudaQuantiseQuery4."""

    _fields_ = [
        ("grid", Grid),
        ("query", Rows),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("block_means", c_void_p),
    ]


class Select4(ctypes.Structure):
    """SaleCudaSelect4."""

    _fields_ = [
        ("grid", Grid),
        ("query_codes", c_void_p),
        ("query_scales", c_void_p),
        ("block_means", c_void_p),
        ("key_codes", Tokens),
        ("key_scales", Tokens),
        ("keys", Tokens),
        ("centre", c_void_p),
        ("thresholds", c_void_p),
        ("strides", POINTER(c_int32)),
        ("unstrided_from", c_int64),
        ("words", c_void_p),
        ("mask_words", c_int64),
    ]


class Decode(ctypes.Structure):
    """SaleCudaDecode."""

    _fields_ = [
        ("query", Rows),
        ("keys", Tokens),
        ("values", Tokens),
        ("output", Rows),
        ("lse", c_void_p),
        ("lengths", c_void_p),
        ("partial", c_void_p),
        ("partial_lse", c_void_p),
        ("capacity", c_int64),
        *((name, c_int32) for name in ("batch", "heads", "kv_heads", "head_dim", "dtype", "lengths_64_bit")),
        *((name, c_int32) for name in ("splits", "least_chunk", "multiprocessors")),
        ("scale", c_float),
    ]


CALLS: dict[str, type[ctypes.Structure]] = {
    "key_centre": KeyCentre,
    "quantise_key": QuantiseKey,
    "query_rows": QueryRows,
    "select": Select,
    "attend": Attend,
    "layer": Layer,
    "quantise_query_4bit": QuantiseQuery4,
    "quantise_key_4bit": QuantiseKey,
    "select_4bit": Select4,
    "decode": Decode,
}


def declare(library: ctypes.CDLL) -> None:
    """Gives the library's functions their types.

    Raises:
        RuntimeError: the library was built from another version of the header.
    """
    if library.sale_cuda_abi() != ABI:
        raise RuntimeError(f"the kernel library speaks ABI {library.sale_cuda_abi()}, this package {ABI}")
    for name, structure in CALLS.items():
        getattr(library, f"sale_cuda_{name}").argtypes = [POINTER(structure), c_void_p]
