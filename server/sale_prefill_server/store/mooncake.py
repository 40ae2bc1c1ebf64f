"""Memory of a cluster, through Mooncake Store: a fast tier that other servers see, over TCP or RDMA.

It keeps blocks only, as `format` says, and promises nothing: Mooncake drops what it has no room for, and a machine's
share goes with the machine. What a session was promised is in the disk or the shared store behind it. There is no
listing of what is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mooncake.store import MooncakeDistributedStore

from sale_prefill_server.store.base import (
    Block,
    BlockEntry,
    BlockKey,
    BlockReader,
    Buffer,
    CorruptError,
    FullError,
    Level,
    NotFoundError,
    Record,
    RecordKey,
    Tier,
    UnavailableError,
    checked_block,
)
from sale_prefill_server.store.format import (
    HEADER_READ_BYTES,
    BlockHeader,
    DamagedError,
    block_header_bytes,
    decode_block_header,
    encode_block_header,
)
from sale_prefill_server.store.names import block_name

#: Memory that Mooncake reads into, in pieces, each used by one thread at a time.
_STAGING_BYTES = 2**20
_STAGING_PIECES = 8

# Mooncake's error codes
_NO_ROOM = -200
_BAD_RANGE = -600
_NO_OBJECT = -704


class MooncakeTier(Tier):
    """A client of a Mooncake master, which also lends `segment_bytes` of this machine's memory to the cluster.

    Args:
        master: "host:port" of the master.
        local_host: "host" or "host:port" at which other machines reach this one.
        metadata: metadata server, or P2PHANDSHAKE for none.
        protocol: "tcp" or "rdma".

    Raises:
        UnavailableError: the master cannot be reached.
    """

    level = Level.MEMORY

    def __init__(
        self,
        master: str,
        *,
        local_host: str,
        segment_bytes: int,
        name: str = "mooncake",
        metadata: str = "P2PHANDSHAKE",
        protocol: str = "tcp",
        rdma_devices: str = "",
    ) -> None:
        self.name = name
        self._store: Any = MooncakeDistributedStore()
        copy_bytes = 2 * _STAGING_PIECES * _STAGING_BYTES
        code = self._store.setup(local_host, metadata, segment_bytes, copy_bytes, protocol, rdma_devices, master)
        if code != 0:
            raise UnavailableError(name, f"the master at {master} cannot be reached (code {code})")
        self._staging = bytearray(_STAGING_PIECES * _STAGING_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._staging))
        self._check(self._store.register_buffer(self._address, len(self._staging)))
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for piece in range(_STAGING_PIECES):
            self._free.put(piece * _STAGING_BYTES)

    @property
    def is_shared(self) -> bool:
        return True

    def put_blocks(self, blocks: Sequence[Block]) -> None:
        for block in map(checked_block, blocks):
            self._check(self._store.upsert_parts(_name(block.key), encode_block_header(block), *block.parts))

    def open_block(self, key: BlockKey) -> BlockReader:
        total_bytes = self._check(self._store.get_size(_name(key)), key)
        try:
            start = self.fetch(key, 0, min(total_bytes, HEADER_READ_BYTES))
            if (size := block_header_bytes(start)) > len(start):
                start = self.fetch(key, 0, min(total_bytes, size))
            header = decode_block_header(start, key)
            if total_bytes != header.total_bytes:
                raise DamagedError(f"{total_bytes} bytes instead of {header.total_bytes}")
        except DamagedError as error:
            raise self.put_aside(key, str(error)) from error
        return _MooncakeReader(self, header)

    def find_blocks(self, keys: Iterable[BlockKey]) -> dict[BlockKey, BlockEntry]:
        wanted = list(keys)
        there = self._store.batch_is_exist([_name(key) for key in wanted]) if wanted else []
        for code in there:
            self._check(code)
        now = time.time()  # when it was written is not known, nor needed: nobody sweeps here
        return {key: BlockEntry(0, now) for key, code in zip(wanted, there, strict=True) if code == 1}

    def delete_blocks(self, keys: Iterable[BlockKey]) -> None:
        names = [_name(key) for key in keys]
        for code in self._store.batch_remove(names, True) if names else []:
            if code != _NO_OBJECT:
                self._check(code)

    def list_blocks(self) -> Iterator[tuple[BlockKey, BlockEntry]]:
        return iter(())

    def put_record(self, record: Record) -> None:
        raise UnavailableError(self.name, "keeps no records")

    def get_record(self, key: RecordKey) -> Record:
        raise NotFoundError(self.name, key)

    def delete_record(self, key: RecordKey) -> None:
        pass

    def list_records(self) -> list[RecordKey]:
        return []

    def close(self) -> None:
        self._store.unregister_buffer(self._address)
        self._store.close()

    def fetch(self, key: BlockKey, start: int, length: int) -> bytearray:
        """A copy of bytes [start, start + length).

        Raises:
            DamagedError: the object ends before.
            NotFoundError, UnavailableError
        """
        data = bytearray(length)
        for done in range(0, length, _STAGING_BYTES):
            count = min(_STAGING_BYTES, length - done)
            with self._piece() as at:
                results = self._store.get_into_ranges(
                    [self._address + at], [[_name(key)]], [[[0]]], [[[start + done]]], [[[count]]]
                )
                code = results[0][0][0]
                if code == _BAD_RANGE or 0 <= code < count:
                    raise DamagedError(f"the object ends before byte {start + length}")
                self._check(code, key)
                data[done : done + count] = memoryview(self._staging)[at : at + count]
        return data

    def put_aside(self, key: BlockKey, reason: str) -> CorruptError:
        """Removes a damaged object; the error to raise."""
        self._store.remove(_name(key), True)
        return CorruptError(self.name, key, reason)

    @contextlib.contextmanager
    def _piece(self) -> Iterator[int]:
        at = self._free.get()
        try:
            yield at
        finally:
            self._free.put(at)

    def _check(self, code: int, key: BlockKey | None = None) -> int:
        if code >= 0:
            return code
        if code == _NO_OBJECT and key is not None:
            raise NotFoundError(self.name, key)
        if code == _NO_ROOM:
            raise FullError(self.name, "the cluster has no room")
        raise UnavailableError(self.name, f"Mooncake says {code}")


class _MooncakeReader(BlockReader):
    def __init__(self, tier: MooncakeTier, header: BlockHeader) -> None:
        self.key = header.key
        self.num_parts = header.num_parts
        self.part_bytes = header.part_bytes
        self._tier = tier
        self._header = header

    def read(self, first_part: int, into: Sequence[Buffer]) -> None:
        size = self.part_bytes
        try:
            data = memoryview(self._tier.fetch(self.key, self._header.offset(first_part), len(into) * size))
            for index, target in enumerate(into):
                memoryview(target)[:] = data[index * size : (index + 1) * size]
            self._header.verify(first_part, into)
        except DamagedError as error:
            raise self._tier.put_aside(self.key, str(error)) from error

    def close(self) -> None:
        pass


def _name(key: BlockKey) -> str:
    return f"{key.tenant}/{block_name(key)}"
