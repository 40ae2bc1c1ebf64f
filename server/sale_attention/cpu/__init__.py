"""SALE on the CPU: native kernels from `csrc/cpu/`, built just in time. `CpuBackend` registers itself as "cpu"."""

from .backend import CpuBackend
from .library import ISA_VARIABLE, available_isas, load_kernels

__all__ = ["ISA_VARIABLE", "CpuBackend", "available_isas", "load_kernels"]
