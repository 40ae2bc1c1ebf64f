"""The CUDA kernel library: built on first use for the architecture at hand, loaded once a process."""

from __future__ import annotations

import ctypes
import functools

import torch

from sale_attention.cuda import abi
from sale_attention.jit import BuildPlan, KernelBuildError, build, kernel_source_root

#: Compute capability to the target that its kernels are written for.
ARCHITECTURES = {(9, 0): "90a"}
_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr")


def build_plan(architecture: str) -> BuildPlan:
    """How the library for `architecture`, such as "90a", is built."""
    root = kernel_source_root()
    sources = [*(root / "cuda").glob("*.cu"), *(root / "cuda" / "sm90").glob("*.cu")]
    return BuildPlan(
        name=f"sale_cuda_sm{architecture}",
        sources=tuple(sorted(str(file.relative_to(root)) for file in sources)),
        source_root=root,
        include_dirs=("include", "cuda"),
        cuda_flags=(*_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"),
    )


@functools.cache
def load_library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The library for a compute capability, built if need be.

    Raises:
        KernelBuildError: there are no kernels for it, or they cannot be built or loaded; says why.
    """
    architecture = ARCHITECTURES.get(capability)
    if architecture is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURES)
        raise KernelBuildError(f"no kernels for compute capability {capability[0]}.{capability[1]}; there are: {known}")
    path = build(build_plan(architecture))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the kernel library {path} cannot be loaded: {error}; delete its folder") from error
    abi.declare(library)
    return library


def call(library: ctypes.CDLL, name: str, arguments: ctypes.Structure, device: torch.device) -> None:
    """Launch a kernel on the device's current stream.

    Raises:
        RuntimeError: the launch failed; names the CUDA error.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        status = getattr(library, f"sale_cuda_{name}")(ctypes.byref(arguments), stream)
    if status > 0:
        raise RuntimeError(f"CUDA kernel {name}: cudaError {status} at launch")
    if status < 0:
        raise RuntimeError(f"CUDA kernel {name}: no tensor map for its inputs (CUresult {-1 - status})")
