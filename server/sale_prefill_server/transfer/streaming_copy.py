"""A copy that goes past the caches, natively; a plain one where that cannot be built."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sale_attention.jit import BuildPlan, KernelBuildError, build, kernel_source_root

logger = logging.getLogger(__name__)

Copy = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], None]


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
def load_copy() -> Copy:
    """Copies the second array into the first, both uint8, contiguous, of equal size. Lets go of the interpreter lock.

    Where the native one cannot be built it is `numpy.copyto`, said once in the log.
    """
    try:
        function = ctypes.CDLL(str(build(build_plan()))).sale_streaming_copy
    except (KernelBuildError, OSError) as error:
        logger.warning("shared memory takes KV more slowly than it could, by plain copies: %s", error)
        return np.copyto
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = None

    def copy(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        function(target.ctypes.data, source.ctypes.data, target.size)

    return copy
