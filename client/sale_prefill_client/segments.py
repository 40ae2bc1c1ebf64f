"""Memory shared with a server on the same host, that KV bytes come and go through without a copy on this side.

The server makes the memory; this side gets it over a Unix socket for the token of `ShmDescriptor`, and keeps the
connection for as long as streams are to use it. Arrays of it stay good after that: after `close`, after the server's
end, until the last one is dropped. What a later stream through the same segment writes shows in them, though: give a
segment to the next stream only when nobody needs the arrays of the last one (`idle` tells).
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import weakref
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from sale_prefill.v1 import kv_transfer_service_pb2 as pb

from .options import SEGMENT_CHUNK_BYTES, Checksum

#: First byte that the server sends to whom it lets in.
_WELCOME = b"\x01"
CONNECT_SECONDS = 5.0
_MANY_CORES = 8
#: Bytes that are copied and digested at a time, so that the second of the two finds them in a cache.
_PIECE_BYTES = 2**20


class SegmentUnreachableError(OSError):
    """The segment cannot be had from here: another host, container or user, or a server that has ended."""


class SegmentFallbackWarning(UserWarning):
    """Memory was to be shared with the server and is not; the bytes go another way."""


class SharedSegment:
    """A segment of shared memory, mapped.

    Args:
        transfer_id: its name in requests.
        descriptor: serialized ShmDescriptor from OpenTransfer.
        size_bytes: size of the segment.

    Raises:
        SegmentUnreachableError: it cannot be had from here.
    """

    transport = "shm"
    #: Of streams that name none. xxh3_64 is twice as fast as crc32c, but holds Python's lock: with many cores, crc32c.
    default_checksum: Checksum = "xxh3_64" if (os.cpu_count() or 1) < _MANY_CORES else "crc32c"
    default_chunk_bytes = SEGMENT_CHUNK_BYTES

    def __init__(self, transfer_id: str, descriptor: bytes, size_bytes: int) -> None:
        self.transfer_id = transfer_id
        self.size_bytes = size_bytes
        self._connection, file_descriptor = connect(pb.ShmDescriptor.FromString(descriptor))
        if file_descriptor is None:
            self._connection.close()
            raise SegmentUnreachableError("the server sent no file descriptor")
        try:
            if os.fstat(file_descriptor).st_size < size_bytes:
                raise SegmentUnreachableError(f"the segment is smaller than the {size_bytes} bytes agreed on")
            mapping = mmap.mmap(file_descriptor, size_bytes)
        except BaseException:
            self._connection.close()
            raise
        finally:
            os.close(file_descriptor)
        # Views of an array refer to the array itself, so that it lives as long as any of them.
        self._mapping: mmap.mmap | None = mapping
        self._array: weakref.ref[npt.NDArray[np.uint8]] | None = None

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """The segment from its start as uint8, in `shape`; a view that keeps the mapping.

        Raises:
            ValueError: larger than the segment, or the segment is closed.
        """
        if self._mapping is None:
            raise ValueError(f"transfer {self.transfer_id!r} is closed")
        num_bytes = math.prod(shape)
        if num_bytes > self.size_bytes:
            raise ValueError(f"{num_bytes} bytes in a segment of {self.size_bytes}: open a larger one")
        whole = None if self._array is None else self._array()
        if whole is None:
            whole = np.frombuffer(self._mapping, dtype=np.uint8)
            self._array = weakref.ref(whole)
        return whole[:num_bytes].reshape(shape)

    def has(self, array: npt.NDArray[np.uint8]) -> bool:
        """Whether an array is the segment's beginning.

        Raises:
            ValueError: it is another part of it, which a stream would write over while it is read.
        """
        place = self.array((array.nbytes,))
        if not np.may_share_memory(place, array):
            return False
        if place.ctypes.data == array.ctypes.data and array.flags.c_contiguous:
            return True
        raise ValueError("the KV lies elsewhere in the segment than at its beginning: copy it first")

    @property
    def idle(self) -> bool:
        """No array of it is alive, so that a stream may write it anew without anybody's harm."""
        return self._array is None or self._array() is None

    @property
    def connected(self) -> bool:
        """The server still has it, as far as can be seen from here."""
        return self._mapping is not None and not ended(self._connection)

    def close(self) -> None:
        """Ends the connection, upon which the server frees its side. Arrays stay good; streams can use it no more."""
        self._mapping = None
        self._connection.close()


def connect(descriptor: pb.ShmDescriptor) -> tuple[socket.socket, int | None]:
    """The connection that a segment lives with, and the file descriptor that came over it.

    Raises:
        SegmentUnreachableError: no such socket here, or the server did not let this process in.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(descriptor.socket_path)
        connection.sendall(descriptor.token)
        greeting, descriptors, _, _ = socket.recv_fds(connection, len(_WELCOME), 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        connection.close()
        raise SegmentUnreachableError(
            error.errno, f"{error.strerror or error}: the server's socket cannot be used from here", error.filename
        ) from error
    if greeting != _WELCOME:
        for file_descriptor in descriptors:
            os.close(file_descriptor)
        connection.close()
        raise SegmentUnreachableError(
            "the server did not let this process have the segment (another user, or too late)"
        )
    for file_descriptor in descriptors:
        os.set_inheritable(file_descriptor, False)
    connection.setblocking(True)
    return connection, descriptors[0] if descriptors else None


def ended(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection on which it sends nothing."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Digest:
    """Of bytes that come in pieces; 0 for "none"."""

    def __init__(self, checksum: Checksum) -> None:
        self._crc32c = 0
        self._is_crc32c = checksum == "crc32c"
        self._xxh3: Any = xxhash.xxh3_64() if checksum == "xxh3_64" else None

    def update(self, data: npt.NDArray[np.uint8]) -> None:
        if self._is_crc32c:
            self._crc32c = crc32c.crc32c(data, self._crc32c)
        elif self._xxh3 is not None:
            self._xxh3.update(data)

    def value(self) -> int:
        return self._crc32c if self._xxh3 is None else int(self._xxh3.intdigest())


def digest_in_place(place: npt.NDArray[np.uint8], checksum: Checksum) -> int:
    """Digest of a chunk where it lies, in its own order; reads the memory once and copies nothing.

    Args:
        place: the chunk's part of one layer's K or V: [tokens, ...] contiguous, or [kv_heads, tokens, ...] of which
            each head is contiguous.
        checksum: algorithm; 0 for "none".
    """
    digest = _Digest(checksum)
    for run in (place,) if place.flags.c_contiguous else place:
        digest.update(run)
    return digest.value()


def put_in_place(place: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], checksum: Checksum) -> int:
    """Copies a chunk to its place and digests it there on the way.

    Args:
        place: as for `digest_in_place`.
        source: of the same shape.
        checksum: algorithm; 0 for "none".
    """
    digest = _Digest(checksum)
    for to, from_ in ((place, source),) if place.flags.c_contiguous else zip(place, source, strict=True):
        rows = max(1, _PIECE_BYTES * len(to) // to.size)
        for start in range(0, len(to), rows):
            piece = to[start : start + rows]
            np.copyto(piece, from_[start : start + rows])
            digest.update(piece)
    return digest.value()
