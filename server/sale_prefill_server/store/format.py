"""Bytes of stored objects: the same in a file, in an object store and in another machine's memory.

A block, little-endian, nothing between the parts::

    header   8s  magic "SALEKVB1"
             H   version (1), H zero
             I   header_bytes, a multiple of 64
             I   num_parts
             Q   part_bytes
             64s tenant digest, hexadecimal, padded with zeros
             32s block hash
             24s codec name, padded with zeros; empty for the bytes as they were
             Q   xxh3_64 of each part, num_parts times
             ... zeros
             Q   xxh3_64 of the header before this field
    parts    num_parts times part_bytes

A record::

    header   8s  magic "SALEKVR1"
             H   version (1), B lossless, B pin
             I   num_blocks
             Q   payload_bytes
             64s tenant digest, 64s session digest, hexadecimal, padded with zeros
    blocks   32s hash, num_blocks times
    payload  payload_bytes
             Q   xxh3_64 of everything before

Whoever reads knows the key that it asked for: an object under another's name is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from sale_prefill_server.store.base import Block, BlockKey, Buffer, Pin, Record, RecordKey

VERSION = 1
_BLOCK_MAGIC = b"SALEKVB1"
_RECORD_MAGIC = b"SALEKVR1"
_BLOCK = struct.Struct("<8sHHIIQ64s32s24s")
_RECORD = struct.Struct("<8sHBBIQ64s64s")
_DIGEST = struct.Struct("<Q")
_HASH_BYTES = 32
_MAXIMUM_PARTS = 2**16
#: Reads of this many bytes hold the whole header of a block of up to 480 parts.
HEADER_READ_BYTES = 4096


class DamagedError(Exception):
    """Bytes are not what was written; says why. Tiers turn it into `CorruptError`."""


@dataclass(frozen=True)
class BlockHeader:
    """What describes a block: where its parts are, and their checksums."""

    key: BlockKey
    header_bytes: int
    part_bytes: int
    checksums: tuple[int, ...]

    @property
    def num_parts(self) -> int:
        """Parts of the block."""
        return len(self.checksums)

    @property
    def total_bytes(self) -> int:
        """Length of the whole object."""
        return self.header_bytes + self.num_parts * self.part_bytes

    def offset(self, part: int) -> int:
        """Where a part begins."""
        return self.header_bytes + part * self.part_bytes

    def verify(self, first_part: int, parts: Sequence[Buffer]) -> None:
        """Compares parts with their checksums.

        Raises:
            DamagedError: one differs.
        """
        for index, part in enumerate(parts, first_part):
            if xxhash.xxh3_64_intdigest(part) != self.checksums[index]:
                raise DamagedError(f"part {index} differs from its checksum")


def _header_bytes(num_parts: int) -> int:
    return -(-(_BLOCK.size + 8 * num_parts + 8) // 64) * 64


def encode_block_header(block: Block) -> bytes:
    """The header of a block; its parts follow as they are."""
    key, num_parts = block.key, len(block.parts)
    size = _header_bytes(num_parts)
    fixed = _BLOCK.pack(
        _BLOCK_MAGIC, VERSION, 0, size, num_parts, block.part_bytes,
        key.tenant.encode(), bytes.fromhex(key.hash), key.codec.encode(),
    )  # fmt: skip
    sums = struct.pack(f"<{num_parts}Q", *(xxhash.xxh3_64_intdigest(part) for part in block.parts))
    described = (fixed + sums).ljust(size - _DIGEST.size, b"\0")
    return described + _DIGEST.pack(xxhash.xxh3_64_intdigest(described))


def block_header_bytes(start: Buffer) -> int:
    """Length of the header that begins with `start`, from its first bytes.

    Raises:
        DamagedError: no such header.
    """
    if len(start) < _BLOCK.size:
        raise DamagedError(f"only {len(start)} bytes")
    magic, version, _, size, num_parts, *_ = _BLOCK.unpack_from(start)
    if magic != _BLOCK_MAGIC:
        raise DamagedError("not a block of KV")
    if version != VERSION:
        raise DamagedError(f"version {version}; this program reads {VERSION}")
    if not 0 < num_parts <= _MAXIMUM_PARTS or size != _header_bytes(num_parts):
        raise DamagedError(f"a header of {size} bytes for {num_parts} parts")
    return int(size)


def decode_block_header(data: Buffer, key: BlockKey) -> BlockHeader:
    """The header that `data` begins with.

    Raises:
        DamagedError: damaged, or of another block than `key`.
    """
    size = block_header_bytes(data)
    if len(data) < size:
        raise DamagedError(f"only {len(data)} of the header's {size} bytes")
    view = memoryview(data)[:size]
    if xxhash.xxh3_64_intdigest(view[:-8]) != _DIGEST.unpack_from(view, size - 8)[0]:
        raise DamagedError("the header differs from its checksum")
    _, _, _, _, num_parts, part_bytes, tenant, hash_, codec = _BLOCK.unpack_from(view)
    found = BlockKey(_text(tenant), hash_.hex(), _text(codec))
    if found != key:
        raise DamagedError(f"it holds block {found.hash[:12]}{found.codec} of tenant {found.tenant[:8]}")
    return BlockHeader(key, size, part_bytes, struct.unpack_from(f"<{num_parts}Q", view, _BLOCK.size))


def encode_record(record: Record) -> bytes:
    """A record's bytes."""
    header = _RECORD.pack(
        _RECORD_MAGIC, VERSION, record.lossless, record.pin, len(record.blocks), len(record.payload),
        record.key.tenant.encode(), record.key.session.encode(),
    )  # fmt: skip
    data = header + b"".join(map(bytes.fromhex, record.blocks)) + record.payload
    return data + _DIGEST.pack(xxhash.xxh3_64_intdigest(data))


def decode_record(data: bytes, key: RecordKey) -> Record:
    """The record that `data` is.

    Raises:
        DamagedError: damaged, or another's than `key`.
    """
    if len(data) < _RECORD.size + _DIGEST.size:
        raise DamagedError(f"only {len(data)} bytes")
    view = memoryview(data)
    if xxhash.xxh3_64_intdigest(view[:-8]) != _DIGEST.unpack_from(view, len(data) - 8)[0]:
        raise DamagedError("the record differs from its checksum")
    magic, version, lossless, pin, num_blocks, payload_bytes, tenant, session = _RECORD.unpack_from(view)
    if magic != _RECORD_MAGIC or version != VERSION:
        raise DamagedError(f"not a record of version {VERSION}")
    found = RecordKey(_text(tenant), _text(session))
    if found != key:
        raise DamagedError(f"it holds record {found.session[:12]} of tenant {found.tenant[:8]}")
    payload_start = _RECORD.size + num_blocks * _HASH_BYTES
    if payload_start + payload_bytes + _DIGEST.size != len(data):
        raise DamagedError(f"{len(data)} bytes, not those of {num_blocks} blocks and {payload_bytes} of payload")
    hashes = (data[at : at + _HASH_BYTES].hex() for at in range(_RECORD.size, payload_start, _HASH_BYTES))
    payload = data[payload_start : payload_start + payload_bytes]
    return Record(key, payload, tuple(hashes), bool(lossless), Pin(pin))


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode("ascii", "replace")
