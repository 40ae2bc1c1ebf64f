"""KV chunks as protobuf bytes without protobuf's copies: what both sides of a bulk stream read and write.

A frame is exactly what the generated classes write and read (`proto/sale_prefill/v1/kv.proto`, KvChunk inside the
message of its stream), so that any gRPC client understands it. Writing copies the payload once, reading not at all.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.message import DecodeError

from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2, prefill_service_pb2

#: Wire types (protobuf encoding guide).
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_CHECKSUM_FIELD, _DATA_FIELD = 6, 15
_CHECKSUM_TAG = bytes([_CHECKSUM_FIELD << 3 | _FIXED64])
_DATA_TAG = bytes([_DATA_FIELD << 3 | _BYTES])
_KIND_INDEX, _INT32_END = 2, 1 << 31
#: Bits that a varint of at most 5 bytes begins below: enough for a uint32.
_UINT32_SHIFTS, _UINT32_END = 28, 1 << 32

#: Metadata of a stream: SHA-256 of its first message (manifest or header) as sent, so that this is checked, too.
#: Senders may leave it out.
MANIFEST_DIGEST_KEY = "x-kv-manifest-digest-bin"


#: Just under the largest block that glibc learns from.
_TEACHING_BYTES = 31 << 20


@cache
def keep_freed_memory() -> None:
    """Tell glibc, once, to keep freed blocks of a message's size for the next message.

    Otherwise it gives each one back to the system, and its pages are faulted in again a millisecond later: a fourth of
    a reader's processor time. Its thresholds follow the largest block that was freed (mallopt(3), M_MMAP_THRESHOLD);
    this one is never touched. Other allocators do not care.
    """
    bytearray(_TEACHING_BYTES)


def message_digest(raw: bytes) -> bytes:
    """What goes under `MANIFEST_DIGEST_KEY`."""
    return hashlib.sha256(raw).digest()


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """A KvChunk. `data` is a view of the bytes that it came in."""

    index: int
    layer: int
    kind: int
    token_start: int
    num_tokens: int
    checksum: int
    data: memoryview | bytes


class FrameError(ValueError):
    """Bytes that are no message of their stream."""


class FrameCodec:
    """Writes and reads the chunks of one kind of stream.

    Args:
        message_class: generated class of the stream's messages.
        field: its field that holds a KvChunk.
    """

    def __init__(self, message_class: type[Any], field: str) -> None:
        self._message_class = message_class
        self._field = field
        self._tag = message_class.DESCRIPTOR.fields_by_name[field].number << 3 | _BYTES

    def encode(self, frame: ChunkFrame, parts: Sequence[Any] | None = None) -> bytes:
        """The message's bytes.

        Args:
            frame: the chunk.
            parts: the data in pieces, one after the other, each a C-contiguous buffer; `frame.data` where left out.
        """
        parts = (frame.data,) if parts is None else parts
        data_bytes = sum(memoryview(part).nbytes for part in parts)
        header = bytearray()
        numbers = (frame.index, frame.layer, frame.kind, frame.token_start, frame.num_tokens)
        for number, value in enumerate(numbers, 1):
            if value:
                header.append(number << 3 | _VARINT)
                header += _varint(value)
        if frame.checksum:
            header += _CHECKSUM_TAG + struct.pack("<Q", frame.checksum)
        if data_bytes:
            header += _DATA_TAG + _varint(data_bytes)
        opening = bytes([self._tag]) + _varint(len(header) + data_bytes)
        return b"".join((opening, header, *parts))

    def encode_group(self, frames: Sequence[ChunkFrame]) -> bytes:
        """The bytes of one message with several chunks, none of which has data."""
        message = self._message_class()
        for frame in frames:
            message.chunks.chunks.add(
                index=frame.index,
                layer=frame.layer,
                kind=frame.kind,
                token_start=frame.token_start,
                num_tokens=frame.num_tokens,
                checksum=frame.checksum,
            )
        encoded: bytes = message.SerializeToString()
        return encoded

    def decode(self, raw: bytes) -> ChunkFrame | Any:
        """The chunk, or the parsed message where it holds something else.

        Raises:
            FrameError: no such message.
        """
        frame = self._chunk(raw)
        if frame is not None:
            return frame
        try:
            message = self._message_class.FromString(raw)
        except DecodeError as error:
            raise FrameError(f"{len(raw)} bytes are no {self._message_class.DESCRIPTOR.name}") from error
        if not message.HasField(self._field):
            return message
        return _frame_of(getattr(message, self._field))

    def _chunk(self, raw: bytes) -> ChunkFrame | None:
        """A chunk whose fields come once, in order, as every protobuf library writes them; None for anything else."""
        try:
            if raw[0] != self._tag:
                return None
            size, position = _read_varint(raw, 1)
            if position + size != len(raw):
                return None
            return _fields(raw, position)
        except IndexError:
            return None


def group_frames(group: kv_pb2.KvChunks) -> list[ChunkFrame]:
    """The chunks of a group."""
    return [_frame_of(chunk) for chunk in group.chunks]


def _frame_of(chunk: kv_pb2.KvChunk) -> ChunkFrame:
    return ChunkFrame(
        chunk.index, chunk.layer, chunk.kind, chunk.token_start, chunk.num_tokens, chunk.checksum, chunk.data
    )


def _fields(raw: bytes, position: int) -> ChunkFrame | None:
    numbers = [0, 0, 0, 0, 0]
    checksum, data, last = 0, memoryview(b""), 0
    end = len(raw)
    while position < end:
        field, wire_type = raw[position] >> 3, raw[position] & 7
        if field <= last:
            return None
        last = field
        if field <= len(numbers) and wire_type == _VARINT:
            numbers[field - 1], position = _read_varint(raw, position + 1)
        elif field == _CHECKSUM_FIELD and wire_type == _FIXED64 and position + 9 <= end:
            checksum, position = int.from_bytes(raw[position + 1 : position + 9], "little"), position + 9
        elif field == _DATA_FIELD and wire_type == _BYTES:
            size, position = _read_varint(raw, position + 1)
            if position + size != end:
                return None
            data, position = memoryview(raw)[position:], end
        else:
            return None
    if numbers[_KIND_INDEX] >= _INT32_END:  # an enumeration is signed
        return None
    index, layer, kind, token_start, num_tokens = numbers
    return ChunkFrame(index, layer, kind, token_start, num_tokens, checksum, data)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    """The value and where it ends. IndexError where it is cut off, or no uint32: protobuf is to judge that."""
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > _UINT32_SHIFTS:
            raise IndexError(position)
    if value >= _UINT32_END:
        raise IndexError(position)
    return value, position


PULL_FRAMES = FrameCodec(kv_transfer_service_pb2.PullKvResponse, "chunk")
PUSH_FRAMES = FrameCodec(kv_transfer_service_pb2.PushKvRequest, "chunk")
PREFILL_FRAMES = FrameCodec(prefill_service_pb2.PrefillResponse, "kv_chunk")
