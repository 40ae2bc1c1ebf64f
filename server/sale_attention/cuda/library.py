"""The CUDA kernel library: built on first use for the architecture at hand, loaded once a process."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence

import torch

from sale_attention.cuda import abi
from sale_attention.jit import BuildPlan, KernelBuildError, build, kernel_source_root

logger = logging.getLogger(__name__)

#: Head sizes that kernels exist for.
HEAD_DIMS = (64, 128)
ARCHITECTURE_VARIABLE = "SALE_PREFILL_CUDA_ARCH"

#: Target to the folder of `csrc/cuda/` with its own kernels. "80" also carries PTX, for every GPU not named here.
ARCHITECTURES = {"80": "sm80", "86": "sm80", "89": "sm80", "90a": "sm90"}
_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr")


def architecture_of(capability: tuple[int, int]) -> str:
    """The best target for a compute capability, such as "90a"; `$SALE_PREFILL_CUDA_ARCH` says otherwise.

    Raises:
        KernelBuildError: no target runs there, or the variable names none; says which there are.
    """
    known = ", ".join(ARCHITECTURES)
    if (wanted := os.environ.get(ARCHITECTURE_VARIABLE)) is not None:
        if wanted not in ARCHITECTURES:
            raise KernelBuildError(f"{ARCHITECTURE_VARIABLE}={wanted!r} is none of {known}")
        return wanted
    if capability < (8, 0):
        raise KernelBuildError(f"no kernels for compute capability {capability[0]}.{capability[1]}; there are: {known}")
    exact = next((name for name in ARCHITECTURES if name.rstrip("a") == f"{capability[0]}{capability[1]}"), None)
    return "80" if exact is None else exact


def build_plan(architecture: str) -> BuildPlan:
    """How the library for a target of `ARCHITECTURES` is built."""
    root = kernel_source_root()
    own = root / "cuda" / ARCHITECTURES[architecture]
    sources = [*(root / "cuda").glob("*.cu"), *own.glob("*.cu")]
    code = "[sm_80,compute_80]" if architecture == "80" else f"sm_{architecture}"
    return BuildPlan(
        name=f"sale_cuda_sm{architecture}",
        sources=tuple(sorted(str(file.relative_to(root)) for file in sources)),
        source_root=root,
        include_dirs=("include", "cuda"),
        cuda_flags=(*_FLAGS, f"-gencode=arch=compute_{architecture},code={code}"),
    )


@functools.cache
def load_library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The library for a compute capability, built if need be.

    Raises:
        KernelBuildError: there are no kernels for it, or they cannot be built or loaded; says why.
    """
    architecture = architecture_of(capability)
    path = build(build_plan(architecture))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the kernel library {path} cannot be loaded: {error}; delete its folder") from error
    abi.declare(library)
    return library


@functools.cache
def library_for(device: torch.device) -> ctypes.CDLL | None:
    """The device's library; None, said once in the log, where there are no kernels for it or they cannot be built."""
    try:
        return load_library(torch.cuda.get_device_capability(device))
    except KernelBuildError as error:
        logger.warning("no native CUDA kernels on %s, so the slow torch reference computes: %s", device, error)
        return None


def kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> ctypes.CDLL | None:
    """The device's library if its kernels take such heads; may build it."""
    covered = device.type == "cuda" and dtype in abi.DTYPES and head_dim in HEAD_DIMS
    return library_for(device) if covered else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def work_counter(device: torch.device) -> torch.Tensor:
    """An int32 zero on the device, which a kernel may count with if it leaves a zero.

    One a stream, whose launches follow each other; a captured launch, which may be replayed on any stream, has its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    place = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    counter = _WORK_COUNTERS.get(place)
    if counter is None:
        counter = _WORK_COUNTERS[place] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter


_WORK_COUNTERS: dict[tuple[int, int], torch.Tensor] = {}


def call(library: ctypes.CDLL, name: str, arguments: Sequence[float], device: torch.device) -> None:
    """Launch a kernel on the device's current stream.

    Args:
        library: of the device.
        name: one of `abi.CALLS`.
        arguments: the members of its structure, in order, nested ones flat.
        device: where.

    Raises:
        RuntimeError: the launch failed; names the CUDA error.
    """
    function, packed = getattr(library, f"sale_cuda_{name}"), abi.CALLS[name].pack(*arguments)
    stream = torch._C._cuda_getCurrentRawStream(device.index)  # torch.cuda.current_stream takes thirty times as long
    if torch.cuda.current_device() == device.index:  # entering and leaving a device costs as much as a launch
        status = function(packed, stream)
    else:
        with torch.cuda.device(device):
            status = function(packed, stream)
    if status > 0:
        raise RuntimeError(f"CUDA kernel {name}: cudaError {status} at launch")
    if status < 0:
        raise RuntimeError(f"CUDA kernel {name}: no tensor map for its inputs (CUresult {-1 - status})")
