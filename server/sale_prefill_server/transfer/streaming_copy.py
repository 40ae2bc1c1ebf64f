"""Native copies: one that goes past the caches, one of many pieces in a single call."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sale_attention.jit import BuildPlan, KernelBuildError, build, kernel_source_root

logger = logging.getLogger(__name__)

#: Shorter data has another digest than `copy_digested` makes.
DIGESTED_BYTES = 241

_Bytes = npt.NDArray[np.uint8]


def build_plan() -> BuildPlan:
    """How the library is built; a second or so, once a machine."""
    return BuildPlan(
        name="sale_transfer",
        sources=("transfer/streaming_copy.cpp",),
        source_root=kernel_source_root(),
        include_dirs=("transfer",),
        compile_flags=("-std=c++17", "-O3"),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The native library; None, said once in the log, where it cannot be built."""
    try:
        library = ctypes.CDLL(str(build(build_plan())))
    except (KernelBuildError, OSError) as error:
        logger.warning("shared memory takes KV more slowly than it could, by plain copies: %s", error)
        return None
    library.sale_streaming_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    library.sale_streaming_copy.restype = None
    pointers = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    library.sale_copy_digested.argtypes = (*pointers, ctypes.c_size_t, ctypes.c_int)
    library.sale_copy_digested.restype = ctypes.c_uint64
    library.sale_gather.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    library.sale_gather.restype = None
    return library


def streaming_copy(target: _Bytes, source: _Bytes) -> None:
    """Copies an array into another of equal size, past the caches; both uint8, contiguous."""
    library = _library()
    if library is None:
        np.copyto(target, source)
    else:
        library.sale_streaming_copy(target.ctypes.data, source.ctypes.data, target.size)


def copy_digested(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], *, shared: bool) -> int:
    """Copies runs of memory past the caches in one call, which other Python threads do not wait for.

    Args:
        targets, sources: addresses.
        sizes: in bytes; DIGESTED_BYTES together at least.
        shared: others may write the sources meanwhile; what is digested is what the targets get all the same.

    Returns:
        XXH3 (64 bits) of all runs together.
    """
    library = _library()
    assert library is not None
    to, from_, lengths = (np.array(each, dtype=np.uintp) for each in (targets, sources, sizes))
    digest: int = library.sale_copy_digested(
        to.ctypes.data, from_.ctypes.data, lengths.ctypes.data, len(lengths), shared
    )
    return digest


def can_gather() -> bool:
    """Whether `gather` and `copy_digested` are there; builds the library where this machine has not done that yet."""
    return _library() is not None


def gather(target_address: int, addresses: Sequence[int], sizes: Sequence[int]) -> None:
    """Copies several pieces of memory to one place, one after the other, through the caches, in one call.

    Args:
        target_address: of `sum(sizes)` bytes.
        addresses, sizes: of the pieces, in bytes.
    """
    library = _library()
    assert library is not None
    pointers, lengths = np.array(addresses, dtype=np.uintp), np.array(sizes, dtype=np.uintp)
    library.sale_gather(target_address, pointers.ctypes.data, lengths.ctypes.data, len(pointers))
