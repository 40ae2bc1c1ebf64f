"""The structures of `csrc/include/sale_prefill/cuda_api.h`, member by member; change both, and `ABI`, together.

They are packed from plain numbers: structures of ctypes take three times as long to fill, and a layer is called often.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

ABI = 6

#: SaleCudaDtype.
DTYPES = {torch.bfloat16: 0, torch.float16: 1}

# Members in the order of the header, in the letters of `struct`; "0q" aligns the end as a structure's end is.
_GRID = "4i 2q 5i 0q"
_ROWS = "P 3q"
_TOKENS = "P 5q P 2q"


def _layout(*members: str) -> struct.Struct:
    return struct.Struct("@" + " ".join((*members, "0q")))


#: Function, without `sale_cuda_`, to the structure that it takes. Pointers that are null are 0.
CALLS = {
    "key_centre": _layout(_GRID, _TOKENS, "P q"),
    "quantise_key": _layout(_GRID, _TOKENS, _TOKENS, _TOKENS, "P q"),
    "query_rows": _layout(_GRID, _ROWS, _TOKENS, "6P f"),
    "sampled": _layout(_GRID, "2P", _TOKENS, _TOKENS, "P 2q 3P f"),
    "select": _layout(_GRID, "P", _TOKENS, _TOKENS, "2P q P q"),
    "attend": _layout(_GRID, _ROWS, _TOKENS, _TOKENS, "P 2q P", _ROWS, "P 2q f P"),
    "count_blocks": _layout("2P q 2i"),
    "layer": _layout(_GRID, _ROWS, _ROWS, *4 * (_TOKENS,), "P 3q 3P q 5P q P q 2P 2q f 5P"),
    "quantise_query_4bit": _layout(_GRID, _ROWS, "3P"),
    "quantise_key_4bit": _layout(_GRID, _TOKENS, _TOKENS, _TOKENS, "P q"),
    "select_4bit": _layout(_GRID, "3P", _TOKENS, _TOKENS, _TOKENS, "3P q P q"),
    "decode": _layout(_ROWS, _TOKENS, _TOKENS, _ROWS, "4P q 9i f"),
}

Numbers = tuple[int, ...]
#: SaleCudaTokens of nothing.
NO_TOKENS: Numbers = (0,) * 9


def is_aligned(tensor: Tensor) -> bool:
    """Whether kernels and the copy engine can read it: rows contiguous, start and strides multiples of 16 bytes."""
    unit, head, token, element = tensor.stride()
    return element == 1 and not (tensor.data_ptr() | (unit | head | token) * tensor.itemsize) & 15


def tokens_of(tensor: Tensor, page_table: Tensor | None, tokens: int) -> Numbers:
    """SaleCudaTokens of keys, values or codes: `[B, Hkv, >= tokens, ...]`, or `[pages, Hkv, page_tokens, ...]`."""
    unit, head, token = tensor.stride()[:3]
    if page_table is None:
        return (tensor.data_ptr(), unit, head, token, tensor.shape[0], tokens, 0, 0, 0)
    units, _, unit_tokens = tensor.shape[:3]
    table = page_table.data_ptr()
    return (tensor.data_ptr(), unit, head, token, units, unit_tokens, table, *page_table.stride())


def rows_of(tensor: Tensor) -> Numbers:
    """SaleCudaRows of queries or output `[B, H, Nq, d]` with a contiguous last dimension."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def pointer(tensor: Tensor | None) -> int:
    """Where it lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def declare(library: ctypes.CDLL) -> None:
    """Gives the library's functions their types.

    Raises:
        RuntimeError: the library was built from another version of the header.
    """
    if library.sale_cuda_abi() != ABI:
        raise RuntimeError(f"the kernel library speaks ABI {library.sale_cuda_abi()}, this package {ABI}")
    for name in CALLS:
        getattr(library, f"sale_cuda_{name}").argtypes = [ctypes.c_char_p, ctypes.c_void_p]
