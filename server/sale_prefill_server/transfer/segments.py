"""Segments of memory that callers on this host share with the server: who has one, for how long, how much in all."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.transfer.segment_budget import SegmentBudget, SegmentLimits, no_capacity
from sale_prefill_server.transfer.segment_listener import TOKEN_BYTES, Admission, SegmentListener
from sale_prefill_server.transfer.segment_memory import SegmentMemory, SegmentTransport, whole_pages
from sale_prefill_server.transfer.socket_directory import SocketDirectory

#: Makes memory of at least so many bytes.
Allocator = Callable[[int], SegmentMemory]


@dataclass(frozen=True)
class SegmentTicket:
    """What a caller needs to get at a new segment.

    Args:
        transfer_id: its name in requests.
        transport: kind of memory.
        size_bytes: room in it.
        socket_path, token: where to connect, and what to show there, once.
        ipc_handle: CUDA IPC handle and UUID of the device.
        expires_in_seconds: time to connect.
    """

    transfer_id: str
    transport: SegmentTransport
    size_bytes: int
    socket_path: str
    token: bytes
    ipc_handle: tuple[bytes, bytes] | None
    expires_in_seconds: float


@dataclass
class _Record:
    """State of one segment, under the broker's lock. `holds` counts who touches its memory."""

    transfer_id: str
    tenant: str
    memory: SegmentMemory
    token_digest: bytes
    deadline: float
    connected: bool = False
    user: Segment | None = None
    closed: bool = False
    holds: int = 0


class Segment:
    """A segment in the hands of one stream, from `SegmentBroker.borrow`."""

    def __init__(self, broker: SegmentBroker, record: _Record) -> None:
        self.transport = record.memory.transport
        self.size_bytes = record.memory.size_bytes
        self._broker = broker
        self._record = record

    @contextmanager
    def memory(self) -> Iterator[torch.Tensor]:
        """The segment's bytes, uint8 [size_bytes], which stay there for the block even where the stream ends meanwhile.

        Raises:
            PrefillError: TRANSFER_UNKNOWN, the stream has ended.
        """
        self._broker._hold(self._record, self)
        try:
            yield self._record.memory.bytes()
        finally:
            self._broker._let_go(self._record)


class SegmentBroker:
    """Owns all segments. Thread-safe; nothing here waits for a peer.

    A segment lives until its owner closes it or the owner's connection ends, until nobody used it for too long, or
    until the server stops; a stream that uses it then still has it to its end.

    Args:
        directory: where the socket goes; the broker removes it in the end. None where there are no allocators.
        limits: how much, how long.
        allocators: by transport, best first as this server sees it.
        allowed_uids: users beside this one whose processes may connect.
    """

    def __init__(
        self,
        directory: SocketDirectory | None,
        limits: SegmentLimits,
        allocators: Mapping[SegmentTransport, Allocator],
        allowed_uids: frozenset[int] = frozenset(),
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._allocators = allocators
        self._lock = threading.Lock()
        self._records: dict[str, _Record] = {}
        # Unmapping gigabytes takes a second: neither an event loop nor the listener waits for that.
        self._freeing = ThreadPoolExecutor(1, "segment-free")
        self.budget = SegmentBudget(limits)
        self._stopped = False
        self._listener: SegmentListener | None = None
        if directory is not None:
            path = directory.socket_path("kv.sock")
            self._listener = SegmentListener(path, allowed_uids, self._admit, self._peer_gone, self.sweep)

    @property
    def transports(self) -> tuple[SegmentTransport, ...]:
        """What can be opened here."""
        return tuple(self._allocators)

    def open(self, tenant: str, transport: SegmentTransport, size_bytes: int) -> SegmentTicket:
        """A new segment. May take seconds where memory is registered with a device: call it off the event loop.

        Raises:
            PrefillError: KV_CAPACITY, too many bytes or segments; INVALID_FIELD, no such size.
        """
        if size_bytes <= 0:
            raise invalid_field("size_bytes", f"{size_bytes}: a segment has at least one byte")
        if transport not in self._allocators or self._listener is None:
            raise invalid_field("transports", f"{transport} is not offered here")
        if self._stopped:
            raise PrefillError(Reason.SHUTTING_DOWN, "the server is stopping: try another one")
        taken_bytes = whole_pages(size_bytes)
        self.budget.take(tenant, transport, taken_bytes)
        try:
            memory = self._allocators[transport](size_bytes)
        except (OSError, RuntimeError) as error:
            self.budget.give_back(tenant, transport, taken_bytes)
            raise no_capacity(
                f"{size_bytes} bytes of {transport} memory cannot be had: {error}", size_bytes, 0
            ) from error
        except BaseException:
            self.budget.give_back(tenant, transport, taken_bytes)
            raise
        token = secrets.token_bytes(TOKEN_BYTES)
        record = _Record(
            transfer_id=secrets.token_hex(16),
            tenant=tenant,
            memory=memory,
            token_digest=_digest(token),
            deadline=time.monotonic() + self._limits.connect_seconds,
        )
        with self._lock:
            self._records[record.transfer_id] = record
        if self._stopped:  # while the memory was being made
            self._close(record)
        return SegmentTicket(
            record.transfer_id,
            transport,
            memory.size_bytes,
            self._listener.path,
            token,
            memory.ipc_handle,
            self._limits.connect_seconds,
        )

    @contextmanager
    def borrow(self, tenant: str, transfer_id: str) -> Iterator[Segment]:
        """A segment for one stream, alone. Its idle time starts again when the stream ends.

        Raises:
            PrefillError: TRANSFER_UNKNOWN, closed, expired or another tenant's; SESSION_BUSY, another stream has it;
                INVALID_FIELD, nobody has connected to it.
        """
        with self._lock:
            record = self._find(tenant, transfer_id)
            if not record.connected:
                raise invalid_field("transfer_id", f"{transfer_id}: connect to its socket before a stream names it")
            if record.user is not None:
                raise PrefillError(
                    Reason.SESSION_BUSY,
                    f"another stream uses transfer {transfer_id!r}: wait for its end, or open another transfer",
                    metadata={"transfer_id": transfer_id},
                    field="transfer_id",
                )
            record.user = segment = Segment(self, record)
            record.holds += 1
        try:
            yield segment
        finally:
            with self._lock:
                record.user = None
                record.deadline = time.monotonic() + self._limits.idle_seconds
            self._let_go(record)

    def close(self, tenant: str, transfer_id: str) -> None:
        """Ends a segment, and waits until its memory is free, but for what a stream that uses it has to its end.

        Raises:
            PrefillError: TRANSFER_UNKNOWN, closed before, expired or another tenant's.
        """
        with self._lock:
            record = self._find(tenant, transfer_id)
        if (freed := self._close(record)) is not None:
            freed.result()

    def sweep(self) -> None:
        """Ends what nobody connected to or used for too long."""
        now = time.monotonic()
        with self._lock:
            late = [record for record in self._records.values() if record.user is None and record.deadline < now]
        for record in late:
            self._close(record)

    def close_all(self) -> None:
        """Ends everything, at shutdown; streams have ended before."""
        with self._lock:
            self._stopped = True
            records = list(self._records.values())
        if self._listener is not None:
            self._listener.close()
        for record in records:
            self._close(record)
        self._freeing.shutdown()
        if self._directory is not None:
            self._directory.remove()

    def _find(self, tenant: str, transfer_id: str) -> _Record:
        record = self._records.get(transfer_id)
        if record is None or record.tenant != tenant or record.closed:
            raise PrefillError(
                Reason.TRANSFER_UNKNOWN,
                f"no transfer {transfer_id!r}: it was closed, it expired, or it is another caller's; open a new one",
                metadata={"transfer_id": transfer_id},
                field="transfer_id",
            )
        return record

    def _admit(self, token: bytes) -> Admission | None:
        digest = _digest(token)
        found = None
        with self._lock:
            for record in self._records.values():
                if hmac.compare_digest(record.token_digest, digest) and not (record.connected or record.closed):
                    found = record
            if found is None:
                return None
            found.connected = True
            found.deadline = time.monotonic() + self._limits.idle_seconds
            descriptor = found.memory.file_descriptor
            # A duplicate, made under the lock: the segment may be freed before it is sent.
            return Admission(found.transfer_id, None if descriptor is None else os.dup(descriptor))

    def _peer_gone(self, transfer_id: str) -> None:
        with self._lock:
            record = self._records.get(transfer_id)
            if record is None:
                return
            record.connected = False
        self._close(record)

    def _close(self, record: _Record) -> Future[None] | None:
        """Marks a segment as ended; its memory goes when nobody touches it and, where need be, its peer has gone."""
        with self._lock:
            record.closed = True
            record.holds += 1
        return self._let_go(record)

    def _hold(self, record: _Record, user: Segment) -> None:
        with self._lock:
            if record.user is not user:
                raise PrefillError(
                    Reason.TRANSFER_UNKNOWN, f"the stream that used transfer {record.transfer_id!r} has ended"
                )
            record.holds += 1

    def _let_go(self, record: _Record) -> Future[None] | None:
        """Drops a hold; the last one on an ended segment has it freed."""
        with self._lock:
            record.holds -= 1
            if record.holds or not record.closed or record.transfer_id not in self._records:
                return None
            if record.connected and not record.memory.outlives_owner and not self._stopped:
                return None  # its connection ends when the peer has unmapped the memory
            del self._records[record.transfer_id]
        if record.connected and self._listener is not None:
            self._listener.disconnect(record.transfer_id)
        try:
            return self._freeing.submit(self._free, record)
        except RuntimeError:  # the broker is closed, and a stream ended after that
            self._free(record)
            return None

    def _free(self, record: _Record) -> None:
        try:
            record.memory.free()
        finally:
            self.budget.give_back(record.tenant, record.memory.transport, record.memory.size_bytes)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def open_broker(
    base: Path, limits: SegmentLimits, allocators: Mapping[SegmentTransport, Allocator], allowed_uids: frozenset[int]
) -> SegmentBroker:
    """A broker with a new socket directory within `base`; without one where there is nothing to offer.

    Raises:
        SocketDirectoryError: the directory cannot be used.
    """
    directory = SocketDirectory(base, shared=bool(allowed_uids)) if allocators else None
    try:
        return SegmentBroker(directory, limits, allocators, allowed_uids)
    except BaseException:
        if directory is not None:
            directory.remove()
        raise
