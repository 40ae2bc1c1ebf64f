"""KV in chunks: every byte of a range once, wherever it goes, a little ahead of its reader."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_prefill.kv_frames import PUSH_FRAMES
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.kv.pool import PAGE_TOKENS, KvPool, KvShape, SessionKv
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import ChunkPlan, KvRange, Layout
from sale_prefill_server.transfer.kv_reader import KvReader
from sale_prefill_server.transfer.kv_writer import KvWriter
from sale_prefill_server.transfer.read_ahead import read_ahead
from sale_prefill_server.transfer.segment_memory import SegmentTransport
from sale_prefill_server.transfer.segment_placement import SegmentPlacement

SHAPE = KvShape(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, device=torch.device("cpu"))
TOKENS = 300


@dataclass(frozen=True)
class Memory:
    """A segment in this process alone."""

    bytes: torch.Tensor
    transport: SegmentTransport = SegmentTransport.SHM

    @property
    def size_bytes(self) -> int:
        return self.bytes.numel()

    @contextmanager
    def memory(self) -> Iterator[torch.Tensor]:
        yield self.bytes


def placed(memory: Memory, plan: ChunkPlan, layout: Layout, checksum: Checksum) -> SegmentPlacement:
    return SegmentPlacement(cast(Any, memory), SHAPE, plan.range, layout, checksum)


def empty_kv(pool: KvPool, num_tokens: int = TOKENS) -> SessionKv:
    kv = pool.create()
    kv.reserve(num_tokens)
    return kv


@pytest.fixture
def pool() -> KvPool:
    return KvPool(SHAPE, 12 * SHAPE.page_bytes)


@pytest.fixture
def kv(pool: KvPool) -> SessionKv:
    """KV of random bits, on pages that do not lie in order."""
    kept = [empty_kv(pool, PAGE_TOKENS) for _ in range(5)]
    for other in kept[::2]:
        other.release()
    filled = empty_kv(pool)
    for layer in range(SHAPE.num_layers):
        for kind in range(2):
            filled.write(layer, kind, 0, torch.randn(TOKENS, SHAPE.num_kv_heads, SHAPE.head_dim).bfloat16())
    filled.extend_to(TOKENS)
    assert len(filled.segments(0, 0, 0, TOKENS)) > 1
    return filled


def whole(kv: SessionKv) -> torch.Tensor:
    """[layers, 2, tokens, heads, head_dim]."""
    layers = [[torch.cat(kv.segments(layer, kind, 0, TOKENS)) for kind in range(2)] for layer in range(3)]
    return torch.stack([torch.stack(tensors) for tensors in layers])


@given(
    start=st.integers(0, 40),
    count=st.integers(1, 200),
    chunk_bytes=st.integers(1, 3000),
    cuts=st.sets(st.integers(1, 199), max_size=4),
)
def test_a_plan_covers_each_token_of_each_tensor_once(start: int, count: int, chunk_bytes: int, cuts: set[int]) -> None:
    boundaries = sorted(start + cut for cut in cuts if cut < count)
    plan = ChunkPlan(KvRange(start, start + count, 1, 3), SHAPE, chunk_bytes, boundaries)
    chunks = [plan[index] for index in range(plan.total_chunks)]
    covered = Counter(
        (chunk.layer, chunk.kind, token)
        for chunk in chunks
        for token in range(chunk.token_start, chunk.token_start + chunk.num_tokens)
    )
    assert set(covered.values()) == {1}
    assert len(covered) == 2 * 2 * count
    assert all(chunk.num_tokens * 32 <= max(32, chunk_bytes) for chunk in chunks)
    spans = [sum(chunk.token_start >= edge for edge in boundaries) for chunk in chunks]
    assert spans == sorted(spans)
    keys = [(span, chunk.layer, chunk.kind, chunk.token_start) for span, chunk in zip(spans, chunks, strict=True)]
    assert keys == sorted(keys)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("checksum", Checksum)
@pytest.mark.parametrize("in_segment", [False, True])
def test_what_is_read_is_what_is_written(
    pool: KvPool, kv: SessionKv, layout: Layout, checksum: Checksum, in_segment: bool
) -> None:
    plan = ChunkPlan(KvRange(0, TOKENS, 0, 3), SHAPE, 1000)
    segment = Memory(torch.zeros(plan.total_bytes + 64, dtype=torch.uint8))
    view = placed(segment, plan, layout, checksum) if in_segment else None
    reader = KvReader(kv, plan, layout, checksum, PUSH_FRAMES, view)
    frames = [PUSH_FRAMES.decode(reader.frame(index)) for index in range(plan.total_chunks)]
    assert all((len(frame.data) == 0) is in_segment for frame in frames)
    if in_segment:
        axes = whole(kv) if layout is Layout.THD else whole(kv).transpose(2, 3)
        assert torch.equal(segment.bytes[: plan.total_bytes], axes.contiguous().view(torch.uint8).flatten())
    copy = empty_kv(pool)
    writer = KvWriter(copy, TOKENS, layout, checksum, plan.total_chunks)
    assert writer.take(frames[::2], view) > 0
    assert writer.missing() == [(index, index + 1) for index in range(1, plan.total_chunks, 2)]
    assert not writer.complete
    writer.take(frames[1::2], view)
    assert writer.complete
    copy.extend_to(TOKENS)
    assert torch.equal(whole(copy), whole(kv))


def test_a_flipped_byte_in_a_segment_is_caught(pool: KvPool, kv: SessionKv) -> None:
    plan = ChunkPlan(KvRange(0, TOKENS, 0, 3), SHAPE, 10_000)
    segment = Memory(torch.zeros(plan.total_bytes, dtype=torch.uint8))
    view = placed(segment, plan, Layout.THD, Checksum.CRC32C)
    reader = KvReader(kv, plan, Layout.THD, Checksum.CRC32C, PUSH_FRAMES, view)
    frames = [PUSH_FRAMES.decode(reader.frame(index)) for index in range(plan.total_chunks)]
    segment.bytes[-1] ^= 1
    writer = KvWriter(empty_kv(pool), TOKENS, Layout.THD, Checksum.CRC32C, plan.total_chunks)
    with pytest.raises(PrefillError) as caught:
        writer.take(frames, view)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert caught.value.metadata == {"chunk_index": str(plan.total_chunks - 1)}


def test_a_writer_that_is_closed_takes_nothing_and_holds_nothing(pool: KvPool, kv: SessionKv) -> None:
    plan = ChunkPlan(KvRange(0, TOKENS, 0, 3), SHAPE, 10_000)
    frame = PUSH_FRAMES.decode(KvReader(kv, plan, Layout.THD, Checksum.CRC32C, PUSH_FRAMES).frame(0))
    used_bytes, copy = pool.used_bytes, empty_kv(pool)
    writer = KvWriter(copy, TOKENS, Layout.THD, Checksum.CRC32C, plan.total_chunks)
    writer.close()
    copy.release()
    with pytest.raises(PrefillError) as caught:
        writer.take([frame])
    assert caught.value.reason is Reason.TRANSFER_UNKNOWN
    assert pool.used_bytes == used_bytes


class Made:
    """Counts what was made, and how much at once."""

    def __init__(self, fails_at: int = -1) -> None:
        self.indices: list[int] = []
        self._fails_at = fails_at

    def __call__(self, batch: range) -> list[bytes]:
        return [self._make(index) for index in batch]

    def _make(self, index: int) -> bytes:
        if index == self._fails_at:
            raise ValueError("no such chunk")
        self.indices.append(index)
        return str(index).encode()


async def test_chunks_come_in_order_a_batch_ahead_and_no_more() -> None:
    made = Made()
    with ThreadPoolExecutor(2) as pool:
        async with aclosing(read_ahead(made, 3, 100, executor=pool, batch_chunks=4)) as chunks:
            assert [await anext(chunks) for _ in range(6)] == [b"3", b"4", b"5", b"6", b"7", b"8"]
            deadline = time.monotonic() + 5
            while len(made.indices) < 13:
                assert time.monotonic() < deadline
                await _pause()
            await _pause()
            assert made.indices == list(range(3, 16))  # 3; 4 to 7; 8 to 11 are being sent, 12 to 15 wait


async def test_several_batches_are_made_at_once_where_asked_for() -> None:
    both = threading.Barrier(2, timeout=5)

    def make(batch: range) -> list[int]:
        if batch.start in (1, 3):
            both.wait()
        return list(batch)

    with ThreadPoolExecutor(2) as pool:
        chunks = [chunk async for chunk in read_ahead(make, 0, 6, executor=pool, batch_chunks=2, ahead=2)]
    assert chunks == list(range(6))


async def test_a_whole_stream_is_every_chunk_once() -> None:
    made = Made()
    with ThreadPoolExecutor(2) as pool:
        chunks = [chunk async for chunk in read_ahead(made, 0, 10, executor=pool, batch_chunks=3)]
        assert chunks == [str(index).encode() for index in range(10)]
        assert [chunk async for chunk in read_ahead(made, 5, 5, executor=pool, batch_chunks=3)] == []


async def test_a_chunk_that_cannot_be_made_ends_the_stream_after_those_before_it() -> None:
    with ThreadPoolExecutor(2) as pool:
        chunks = read_ahead(Made(fails_at=3), 0, 10, executor=pool, batch_chunks=2)
        assert [await anext(chunks) for _ in range(3)] == [b"0", b"1", b"2"]
        with pytest.raises(ValueError, match="no such chunk"):
            await anext(chunks)


async def test_nothing_runs_after_a_stream_was_closed() -> None:
    running, proceed = threading.Event(), threading.Event()

    def slow(batch: range) -> list[bytes]:
        if batch.start:
            running.set()
            proceed.wait(5)
            finished.extend(batch)
        return [b""]

    finished: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        chunks = read_ahead(slow, 0, 10, executor=pool, batch_chunks=1)
        await anext(chunks)
        while not running.is_set():
            await _pause()
        threading.Timer(0.1, proceed.set).start()
        await chunks.aclose()
        assert finished == [1]


async def _pause() -> None:
    await asyncio.sleep(0.02)
