"""Memory that KV bytes move through beside gRPC, and how a process on the same host gets at it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

import numpy as np
import torch

#: Neither side may cut the memory from under the other, which would then die of SIGBUS, nor take such seals off or add
#: some that stop writing.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SegmentTransport(StrEnum):
    """Kind of memory."""

    SHM = "shm"
    CUDA_IPC = "cuda_ipc"


class SegmentMemory(Protocol):
    """Memory of one segment. Its owner calls `free` once, when nothing reads or writes it any more."""

    @property
    def transport(self) -> SegmentTransport:
        """What kind it is."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes, in whole pages."""
        ...

    @property
    def file_descriptor(self) -> int | None:
        """What the peer gets to map it by; None where the handle alone does."""
        ...

    @property
    def ipc_handle(self) -> tuple[bytes, bytes] | None:
        """CUDA IPC handle and UUID of the device; None where a file descriptor gives access."""
        ...

    @property
    def outlives_owner(self) -> bool:
        """Whether the peer's mapping stays good when this side has freed the memory."""
        ...

    def bytes(self) -> torch.Tensor:
        """All of it, as uint8 [size_bytes]; not to be used after `free`."""
        ...

    def free(self) -> None:
        """Gives it back."""
        ...


class SharedMemory:
    """Anonymous shared memory (memfd) of this host.

    It has no name: it is gone when the last process that maps it or holds its descriptor is, however that ends. Pages
    come with the first write; a fresh segment therefore takes bytes several times slower than one that was used before.

    Args:
        size_bytes: wanted size; rounded up to whole pages.
        pin: registers the mapping for copies from a device; returns what undoes that. None leaves it as it is.

    Raises:
        OSError: no memory, or no descriptors left.
    """

    transport = SegmentTransport.SHM
    ipc_handle = None
    outlives_owner = True

    def __init__(self, size_bytes: int, pin: Callable[[int, int], Callable[[], None]] | None = None) -> None:
        self.size_bytes = whole_pages(size_bytes)
        self._descriptor = os.memfd_create("sale-prefill-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, self.size_bytes)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self._descriptor, self.size_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._bytes: torch.Tensor | None = torch.from_numpy(np.frombuffer(self._mapping, dtype=np.uint8))
        self._unpin: Callable[[], None] | None = None
        if pin is not None:
            try:
                self._unpin = pin(self._bytes.data_ptr(), self.size_bytes)
            except BaseException:
                self.free()
                raise

    @property
    def file_descriptor(self) -> int:
        """Descriptor of the memory, for SCM_RIGHTS; stays this object's."""
        return self._descriptor

    def bytes(self) -> torch.Tensor:
        """The mapping, as uint8 [size_bytes] on the CPU."""
        if self._bytes is None:
            raise ValueError("the segment's memory was freed already")
        return self._bytes

    def free(self) -> None:
        """Unmaps it and closes the descriptor; the peer's mapping stays."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._bytes = None
        with contextlib.suppress(BufferError):  # somebody still has a view: the last one unmaps it
            self._mapping.close()
        os.close(self._descriptor)


def whole_pages(size_bytes: int) -> int:
    """`size_bytes` rounded up to pages of this host."""
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
