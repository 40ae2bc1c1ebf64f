"""Chunks written and read by hand are those that protobuf writes and reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from sale_prefill.kv_frames import PREFILL_FRAMES, PULL_FRAMES, PUSH_FRAMES, ChunkFrame, FrameCodec, FrameError
from sale_prefill.v1 import kv_pb2, prefill_service_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb

STREAMS = [
    (PULL_FRAMES, pb.PullKvResponse, "chunk"),
    (PUSH_FRAMES, pb.PushKvRequest, "chunk"),
    (PREFILL_FRAMES, prefill_service_pb2.PrefillResponse, "kv_chunk"),
]
EACH_STREAM = pytest.mark.parametrize(("codec", "message_class", "field"), STREAMS)
UINT32 = st.one_of(st.sampled_from([0, 1, 127, 128, 2**14, 2**32 - 1]), st.integers(0, 2**32 - 1))
UINT64 = st.one_of(st.sampled_from([0, 1, 2**64 - 1]), st.integers(0, 2**64 - 1))
FRAMES = st.builds(ChunkFrame, UINT32, UINT32, st.integers(0, 3), UINT32, UINT32, UINT64, st.binary(max_size=300))


def as_message(frame: ChunkFrame) -> kv_pb2.KvChunk:
    return kv_pb2.KvChunk(**{**dataclasses.asdict(frame), "data": bytes(frame.data)})


def as_frame(chunk: kv_pb2.KvChunk) -> ChunkFrame:
    return ChunkFrame(*(getattr(chunk, name) for name in ChunkFrame.__slots__))


@EACH_STREAM
@given(frame=FRAMES)
def test_protobuf_reads_what_is_written_here(
    codec: FrameCodec, message_class: Any, field: str, frame: ChunkFrame
) -> None:
    raw = codec.encode(frame)
    assert message_class.FromString(raw) == message_class(**{field: as_message(frame)})
    assert codec.decode(raw) == frame


@EACH_STREAM
@given(frame=FRAMES)
def test_what_protobuf_writes_is_read_here(
    codec: FrameCodec, message_class: Any, field: str, frame: ChunkFrame
) -> None:
    raw = message_class(**{field: as_message(frame)}).SerializeToString()
    assert codec.decode(raw) == frame
    assert codec.encode(frame) == raw


@given(
    raw=st.binary(max_size=40), cut=st.integers(0, 60), frame=FRAMES, at=st.integers(0, 20), byte=st.integers(0, 255)
)
def test_broken_bytes_are_judged_as_protobuf_judges_them(
    raw: bytes, cut: int, frame: ChunkFrame, at: int, byte: int
) -> None:
    flipped = bytearray(PULL_FRAMES.encode(frame))
    flipped[at % len(flipped)] = byte
    for candidate in (raw, PULL_FRAMES.encode(frame)[:cut], bytes(flipped), b"\x12" + raw):
        try:
            message = pb.PullKvResponse.FromString(candidate)
        except DecodeError:
            with pytest.raises(FrameError):
                PULL_FRAMES.decode(candidate)
            continue
        read = PULL_FRAMES.decode(candidate)
        assert read == (as_frame(message.chunk) if message.HasField("chunk") else message)


def test_other_messages_of_the_stream_come_as_they_are() -> None:
    manifest = pb.PullKvResponse(manifest=kv_pb2.KvManifest(total_chunks=3))
    assert PULL_FRAMES.decode(manifest.SerializeToString()) == manifest


def test_a_payload_in_pieces_is_joined_once_and_read_in_place() -> None:
    pieces = [np.arange(10, dtype=np.float32), memoryview(b"abc"), b"", np.full(300, 7, np.uint8)]
    data = b"".join(pieces)
    raw = PULL_FRAMES.encode(ChunkFrame(1, 2, 1, 3, 4, 5, b""), pieces)
    read = PULL_FRAMES.decode(raw)
    assert bytes(read.data) == data
    assert isinstance(read.data, memoryview)
    assert read.data.obj is raw
