"""The kernel library: built on first use, loaded once a process; and which instruction set runs."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from sale_attention.cpu import abi
from sale_attention.jit import BuildPlan, KernelBuildError, build, kernel_source_root

ISA_VARIABLE = "SALE_PREFILL_CPU_ISA"
#: Plain C++: right everywhere, and slower than the torch reference (`crossover.py` has both).
SLOWEST_ISA = "portable"
SANITIZE_VARIABLE = "SALE_PREFILL_CPU_SANITIZE"

# -ffp-contract=off keeps the quantiser and the compare as they are written; no -ffast-math, since NaN must show.
_COMPILE_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_STATUS = {1: "out of memory for scratch buffers", 2: "unknown instruction set"}


class CpuKernels:
    """One instruction set of the loaded library."""

    def __init__(self, library: ctypes.CDLL, index: int, isa: str) -> None:
        self._library = library
        self._index = index
        self.isa = isa

    def call(self, name: str, arguments: ctypes.Structure) -> None:
        """Run a kernel; the interpreter lock is released meanwhile.

        Raises:
            MemoryError: the scratch buffers could not be had.
        """
        status = getattr(self._library, f"sale_cpu_{name}")(self._index, ctypes.byref(arguments))
        if status:
            raise MemoryError(f"CPU kernel {name}: {_STATUS.get(status, f'status {status}')}")


def build_plan() -> BuildPlan:
    """How the library is built; `SALE_PREFILL_CPU_SANITIZE=address,undefined` builds it for the sanitizers."""
    root = kernel_source_root()
    sanitize = os.environ.get(SANITIZE_VARIABLE, "")
    extra = (f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g", "-O1") if sanitize else ()
    return BuildPlan(
        name="sale_cpu",
        sources=tuple(sorted(f"cpu/{file.name}" for file in (root / "cpu").glob("*.cpp"))),
        source_root=root,
        include_dirs=("include", "cpu"),
        compile_flags=(*_COMPILE_FLAGS, *extra),
        link_flags=extra[:1],
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, built if need be.

    Raises:
        KernelBuildError: it cannot be built or loaded; says why.
    """
    # torch's OpenMP runtime is in the process already, and gives the library its symbols and its thread pool.
    import torch  # noqa: F401

    path: Path = build(build_plan())
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the kernel library {path} cannot be loaded: {error}; delete its folder") from error
    abi.declare(library)
    return library


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best first.

    Raises:
        KernelBuildError: the library cannot be built.
    """
    return tuple(name for name, _ in _supported(load_library()))


def _supported(library: ctypes.CDLL) -> list[tuple[str, int]]:
    indices = range(library.sale_cpu_isa_count())
    return [(library.sale_cpu_isa_name(i).decode(), i) for i in indices if library.sale_cpu_supports(i)]


def load_kernels(isa: str | None = None) -> CpuKernels:
    """Kernels of `isa`, else of what `SALE_PREFILL_CPU_ISA` names, else of the best that runs here.

    Raises:
        KernelBuildError: the library cannot be built.
        ValueError: this machine does not run `isa`; lists what it runs.
    """
    library = load_library()
    supported = dict(_supported(library))
    wanted = isa or os.environ.get(ISA_VARIABLE) or next(iter(supported))
    if wanted not in supported:
        raise ValueError(
            f"instruction set {wanted!r} ({'argument' if isa else ISA_VARIABLE}) does not run on this machine; "
            f"it runs {', '.join(supported)}"
        )
    return CpuKernels(library, supported[wanted], wanted)
