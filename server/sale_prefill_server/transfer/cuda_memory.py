"""Device memory that another process can map (CUDA IPC), and host memory registered for fast copies.

torch's own allocator gives out parts of larger allocations, and a handle opens the whole allocation to the peer: so the
memory of a segment is allocated by itself.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import torch

from sale_prefill_server.transfer.segment_memory import SegmentTransport, whole_pages

_REGISTER_PORTABLE = 1
_HANDLE_BYTES = 64


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed. Names the call and the error."""


class CudaIpcMemory:
    """Memory of one CUDA device, with a handle that other processes of this host map it by.

    The peer closes its mapping before it ends the connection, and this side frees only then: memory that is freed while
    a peer has it mapped is undefined (CUDA Runtime API, `cudaIpcGetMemHandle`).

    Args:
        size_bytes: wanted size; rounded up to whole pages of the host, as segments are.
        device: the CUDA device.

    Raises:
        CudaError: no memory, or no CUDA IPC on this host.
    """

    transport = SegmentTransport.CUDA_IPC
    file_descriptor = None
    outlives_owner = False

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.size_bytes = whole_pages(size_bytes)
        self._device = torch.device(device.type, device.index if device.index is not None else 0)
        pointer = ctypes.c_void_p()
        _call("cudaSetDevice", self._device.index)
        _call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(self.size_bytes))
        self._address = int(pointer.value or 0)
        try:
            handle = (ctypes.c_char * _HANDLE_BYTES)()
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(self._address))
            uuid = device_uuid(self._device)
        except BaseException:
            self.free()
            raise
        self.ipc_handle = (bytes(handle), uuid)

    def bytes(self) -> torch.Tensor:
        """The memory, as uint8 [size_bytes] on the device."""
        return torch.as_tensor(_DeviceBytes(self._address, self.size_bytes), device=self._device)

    def free(self) -> None:
        """Frees it."""
        _call("cudaSetDevice", self._device.index)
        _call("cudaFree", ctypes.c_void_p(self._address))


def device_uuid(device: torch.device) -> bytes:
    """The device's UUID, 16 bytes: names it in other processes, whatever numbers they see."""
    return UUID(str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")).bytes


class _DeviceBytes:
    """Device memory as torch takes it without a copy (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def register_host_memory(address: int, size_bytes: int, device: torch.device) -> Callable[[], None]:
    """Locks host memory in place, so that a device copies to and from it directly. Returns what undoes that.

    Takes about a second for some GiB: every page comes into being.

    Raises:
        CudaError: it cannot be locked.
    """
    index = device.index or 0
    _call("cudaSetDevice", index)
    _call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _REGISTER_PORTABLE)

    def undo() -> None:
        _call("cudaSetDevice", index)
        _call("cudaHostUnregister", ctypes.c_void_p(address))

    return undo


def _call(name: str, *arguments: Any) -> None:
    runtime = _runtime()
    status = getattr(runtime, name)(*arguments)
    if status:
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        text = runtime.cudaGetErrorString(status)
        runtime.cudaGetLastError()  # torch must not find it
        raise CudaError(f"{name}: {(text or b'').decode()} (cudaError {status})")


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch uses.

    Raises:
        CudaError: there is none.
    """
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libcudart.so.{major}"] if major else []
    names += [str(file) for folder in sys.path for file in sorted(Path(folder).glob("nvidia/*/lib/libcudart.so.*"))]
    for name in (*names, "libcudart.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("no CUDA runtime (libcudart) is to be found: install one, or leave CUDA_IPC out")
