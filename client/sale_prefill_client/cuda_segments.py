"""Device memory of a server on the same host and GPU (CUDA IPC), as torch tensors without a copy.

The memory is the server's: it is gone when the server ends, and the server cannot free it before this side closes the
segment. Copy what is to be kept.
"""

from __future__ import annotations

import ctypes
import math
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sale_prefill.v1 import kv_transfer_service_pb2 as pb

from .extras import require
from .kv import KvCache
from .options import Checksum
from .segments import SegmentUnreachableError, SharedSegment, connect, ended

if TYPE_CHECKING:
    from torch import Tensor

_LAZY_ENABLE_PEER_ACCESS = 1
_HANDLE_BYTES = 64


class _IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class CudaSegment:
    """A segment of device memory, mapped.

    Args:
        transfer_id: its name in requests.
        descriptor: serialized CudaIpcDescriptor from OpenTransfer.
        size_bytes: size of the segment.

    Raises:
        SegmentUnreachableError: it cannot be had from here.
        MissingExtraError: torch is not installed.
    """

    transport = "cuda_ipc"
    #: The only one: the bytes never are in host memory.
    default_checksum: Checksum = "none"
    #: Of streams that name none: a device copies a chunk of 8 MiB in less time than announcing it takes.
    default_chunk_bytes = 64 << 20

    def __init__(self, transfer_id: str, descriptor: bytes, size_bytes: int) -> None:
        self.transfer_id = transfer_id
        self.size_bytes = size_bytes
        message = pb.CudaIpcDescriptor.FromString(descriptor)
        self._device_index = _device_of(message.device_uuid)
        self._runtime = _load_runtime()
        self._address = 0
        self._connection: socket.socket
        self._connection, _ = connect(message.connection)
        try:
            self._address = self._open(message.handle)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        self._call("cudaSetDevice", self._device_index)
        opened = _IpcHandle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), opened, _LAZY_ENABLE_PEER_ACCESS)
        return int(address.value or 0)

    def tensor(self) -> Tensor:
        """All of it, uint8 [size_bytes] on the device. Drop it, and what shares it, before `close`."""
        if not self._address:
            raise ValueError(f"transfer {self.transfer_id!r} is closed")
        torch = require("torch", extra="torch", purpose="KV in device memory")
        tensor: Tensor = torch.as_tensor(
            _DeviceBytes(self._address, self.size_bytes), device=f"cuda:{self._device_index}"
        )
        return tensor

    def array(self, shape: tuple[int, ...]) -> Tensor:
        """The segment from its start as a tensor of uint8, in `shape`; a view, as `tensor`.

        Raises:
            ValueError: larger than the segment, or the segment is closed.
        """
        num_bytes = math.prod(shape)
        if num_bytes > self.size_bytes:
            raise ValueError(f"{num_bytes} bytes in a segment of {self.size_bytes}: open a larger one")
        return self.tensor()[:num_bytes].reshape(shape)

    @property
    def connected(self) -> bool:
        """The server still has it, as far as can be seen from here."""
        return bool(self._address) and not ended(self._connection)

    def close(self) -> None:
        """Unmaps the memory, then tells the server, which frees it. No tensor of it may be used after that."""
        if self._address:
            address, self._address = self._address, 0
            try:
                self._call("cudaSetDevice", self._device_index)
                self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))
            finally:
                self._connection.close()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._runtime, name)(*arguments)
        if status:
            self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
            text = (self._runtime.cudaGetErrorString(status) or b"").decode()
            self._runtime.cudaGetLastError()  # torch must not find it
            raise SegmentUnreachableError(f"{name}: {text} (cudaError {status})")


Segment = SharedSegment | CudaSegment


class DeviceKvCache(KvCache):
    """A range of a session's KV cache in device memory; `buffer` is a torch tensor of uint8, shaped as in `KvCache`.

    `torch`, `layer` and `to_dynamic_cache` give tensors on the device. One that views a segment is good until that is
    closed.
    """

    __slots__ = ()

    def copied(self) -> DeviceKvCache:
        """The same in memory of this process's own, on the device."""
        torch = require("torch", extra="torch", purpose="KV in device memory")
        tensor: Any = self.buffer
        own = replace(self, buffer=tensor.clone())
        torch.cuda.synchronize(tensor.device)
        return own

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        tensor: Any = self.buffer
        return int(tensor.numel())

    def numpy(self, *, as_float32: bool = False) -> Any:
        """The KV as one numpy array, copied to host memory; otherwise as `KvCache.numpy`."""
        tensor: Any = self.buffer
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "buffer"}
        return KvCache(**fields, buffer=tensor.cpu().numpy()).numpy(as_float32=as_float32)

    def torch(self) -> Tensor:
        """The KV as one tensor on the device in its own element type, a view shaped as `numpy()`."""
        torch = require("torch", extra="torch", purpose="KV as torch tensors")
        buffer: Any = self.buffer
        tensor: Tensor = buffer.view(getattr(torch, self.spec.element_type))
        return tensor


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


def _device_of(device_uuid: bytes) -> int:
    """This process's number of the device."""
    torch = require("torch", extra="torch", purpose="KV in device memory")
    for index in range(torch.cuda.device_count()):
        found = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-")
        if UUID(found).bytes == device_uuid:
            return index
    raise SegmentUnreachableError(f"this process does not see the server's GPU {UUID(bytes=device_uuid)}")


def _load_runtime() -> ctypes.CDLL:
    torch = require("torch", extra="torch", purpose="KV in device memory")
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libcudart.so.{major}"] if major else []
    names += [str(file) for folder in sys.path for file in sorted(Path(folder).glob("nvidia/*/lib/libcudart.so.*"))]
    for name in (*names, "libcudart.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SegmentUnreachableError("no CUDA runtime (libcudart) is to be found")
