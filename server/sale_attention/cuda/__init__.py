"""SALE on NVIDIA GPUs: kernels from `csrc/cuda/`, built just in time. `CudaBackend` registers itself as "cuda"."""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
