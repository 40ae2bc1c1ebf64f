"""KV in a segment is to the byte what the stream says, or the transfer fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from sale_prefill.kv_frames import PUSH_FRAMES, ChunkFrame, group_frames
from sale_prefill.v1 import kv_pb2
from sale_prefill_client.errors import ChecksumMismatchError, ProtocolError
from sale_prefill_client.kv import KvCache
from sale_prefill_client.results import KvSpec
from sale_prefill_client.segment_kv import SegmentAssembler, SegmentChunks
from sale_prefill_client.segments import SharedSegment
from tests.segments import SHM, broker_in, connected
from tests.unit.client.test_client_kv_assembly import problem


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedSegment]:
    with broker_in(tmp_path_factory.mktemp("run")) as broker:
        segment = connected(broker.open("a", SHM, 4096))
        yield segment
        segment.close()


def placed(
    segment: SharedSegment, layout: str = "THD", checksum: str = "crc32c"
) -> tuple[np.ndarray, kv_pb2.KvManifest, list[ChunkFrame]]:
    """KV whose bytes are in the segment, in `layout`, and its stream without them."""
    kv, manifest, chunks = problem(layout, checksum)
    ordered = kv if layout == "THD" else kv.transpose(0, 1, 3, 2, 4)
    segment.array((kv.nbytes,))[:] = np.ascontiguousarray(ordered).view(np.uint8).reshape(-1)
    frames = [
        ChunkFrame(chunk.index, chunk.layer, chunk.kind, chunk.token_start, chunk.num_tokens, chunk.checksum, b"")
        for chunk in chunks
    ]
    return ordered, manifest, frames


def assembler(segment: SharedSegment, **options: Any) -> SegmentAssembler:
    given = {"token_range": None, "layer_range": None, "layout": "THD", "checksum": "crc32c", **options}
    return SegmentAssembler(segment, "s-1", **given)


@pytest.mark.parametrize("group", [1, 5, 18])
@pytest.mark.parametrize("checksum", ["crc32c", "xxh3_64", "none"])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_the_cache_is_the_segment(segment: SharedSegment, layout: str, checksum: str, group: int) -> None:
    kv, manifest, frames = placed(segment, layout, checksum)
    with closing(assembler(segment, layout=layout, checksum=checksum)) as assembly:
        assembly.add_manifest(manifest)
        for start in range(0, len(frames), group):
            assembly.add_chunks(frames[start : start + group])
        assert (assembly.complete, assembly.received_bytes) == (True, kv.nbytes)
        cache = assembly.finish()
    np.testing.assert_array_equal(cache.numpy(), kv)
    assert segment.has(cache.buffer)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("checksum", ["crc32c", "xxh3_64"])
def test_a_byte_that_differs_is_caught(segment: SharedSegment, checksum: str, at_once: bool) -> None:
    kv, manifest, frames = placed(segment, checksum=checksum)
    segment.array((kv.nbytes,))[kv.nbytes // 2] ^= 1
    with closing(assembler(segment, checksum=checksum, verified_at_once=at_once)) as assembly:
        assembly.add_manifest(manifest)

        def assemble() -> None:
            assembly.add_chunks(frames)
            if not at_once:
                assembly.finish()

        with pytest.raises(ChecksumMismatchError, match="KV chunk 9") as caught:
            assemble()
    assert caught.value.metadata == {"chunk_index": "9"}


def test_a_chunk_that_is_verified_at_once_is_good_when_add_chunk_returns(segment: SharedSegment) -> None:
    kv, manifest, frames = placed(segment)
    with closing(assembler(segment, verified_at_once=True)) as assembly:
        assembly.add_manifest(manifest)
        assembly.add_chunk(frames[0])
        segment.array((kv.nbytes,))[0] ^= 1  # its reader's own business now
        assembly.add_chunks(frames[1:])
        assert assembly.finish().num_bytes == kv.nbytes


def test_data_beside_the_segment_is_refused(segment: SharedSegment) -> None:
    _, manifest, frames = placed(segment)
    with closing(assembler(segment)) as assembly:
        assembly.add_manifest(manifest)
        first = frames[0]
        with pytest.raises(ProtocolError, match="beside its segment"):
            assembly.add_chunk(ChunkFrame(0, 0, 1, 0, first.num_tokens, first.checksum, b"x"))


def test_a_chunk_out_of_order_is_refused(segment: SharedSegment) -> None:
    _, manifest, frames = placed(segment)
    with closing(assembler(segment)) as assembly:
        assembly.add_manifest(manifest)
        with pytest.raises(ProtocolError, match="chunk 2 came where 1 was due"):
            assembly.add_chunks([frames[0], frames[2]])


def test_a_segment_that_is_too_small_takes_nothing(tmp_path: Any) -> None:
    with broker_in(tmp_path) as broker:
        small = connected(broker.open("a", SHM, 1))
        _, manifest, _ = problem()
        manifest.range.token_end = 100
        manifest.total_bytes *= 10
        with closing(assembler(small)) as assembly, pytest.raises(ValueError, match="open a larger one"):
            assembly.add_manifest(manifest)
        small.close()


def cache_of(kv: np.ndarray, manifest: kv_pb2.KvManifest, layout: str) -> KvCache:
    tokens = list(range(kv.shape[2 if layout == "THD" else 3]))
    return KvCache.from_numpy(kv, KvSpec.from_proto(manifest.spec), token_ids=tokens, layout=layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("checksum", ["crc32c", "xxh3_64", "none"])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_a_push_brings_the_bytes_once_and_announces_them(
    segment: SharedSegment, layout: str, checksum: Any, in_place: bool
) -> None:
    kv, manifest, frames = placed(segment, layout, checksum)
    if in_place:
        kv = segment.array((kv.nbytes,)).view(np.uint16).reshape(kv.shape)
    cache = cache_of(kv, manifest, layout)
    assert segment.has(cache.buffer) == in_place
    if not in_place:
        segment.array((kv.nbytes,))[:] = 0xAA
    chunks = SegmentChunks(segment, cache, None, 4 * 16, checksum)
    sent = [(group_frames(PUSH_FRAMES.decode(raw).chunks), size) for raw, size in chunks.frames([(0, 18)])]
    assert [frame for group, _ in sent for frame in group] == frames
    assert sum(size for _, size in sent) == kv.nbytes
    assert len(sent[0][0]) == 1
    np.testing.assert_array_equal(segment.array((kv.nbytes,)).view(np.uint16).reshape(kv.shape), kv)


def test_only_chunks_that_are_missing_are_brought(segment: SharedSegment) -> None:
    kv, manifest, frames = placed(segment)
    whole = segment.array((kv.nbytes,))
    whole[:] = 0
    chunks = SegmentChunks(segment, cache_of(kv, manifest, "THD"), None, 4 * 16, "crc32c")
    sent = [
        frame for raw, _ in chunks.frames([(2, 4), (17, 18)]) for frame in group_frames(PUSH_FRAMES.decode(raw).chunks)
    ]
    assert sent == [frames[2], frames[3], frames[17]]
    present = (whole.view(np.uint16).reshape(kv.shape) == kv).all(axis=(3, 4))
    assert present[0, 0].tolist() == [False] * 8 + [True] * 2
    assert present[0, 1, :4].all()
    assert present[2, 1].tolist() == [False] * 8 + [True] * 2
