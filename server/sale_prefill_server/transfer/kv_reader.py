"""Reads chunks of a session's KV as frames of a stream. Copies from the device: call it off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sale_prefill.kv_frames import ChunkFrame, FrameCodec
from sale_prefill_server.kv.pool import SessionKv
from sale_prefill_server.transfer.checksums import CHECKSUMS, Checksum
from sale_prefill_server.transfer.chunks import ChunkPlan, Layout, PlannedChunk
from sale_prefill_server.transfer.segment_placement import SegmentPlacement


class KvReader:
    """The chunks of a plan, each by its index. Thread-safe.

    Args:
        kv: source; the caller holds a reference while it reads.
        plan: what each chunk holds.
        layout: axis order.
        checksum: digest of each chunk.
        codec: stream that the frames belong to.
        placement: where the bytes go; in the frames themselves where left out.
    """

    def __init__(
        self,
        kv: SessionKv,
        plan: ChunkPlan,
        layout: Layout,
        checksum: Checksum,
        codec: FrameCodec,
        placement: SegmentPlacement | None = None,
    ) -> None:
        self._kv = kv
        self.plan = plan
        self._layout = layout
        self._digest = CHECKSUMS[checksum]
        self._codec = codec
        self._placement = placement

    def frames(self, indices: range, *, grouped: bool = False) -> list[tuple[bytes, int]]:
        """Messages that carry chunks, each with its bytes of KV; one for all of them where they are `grouped`, which
        those in a segment may be."""
        sizes = [self.plan.num_bytes(index) for index in indices]
        if not grouped:
            return [(self.frame(index), size) for index, size in zip(indices, sizes, strict=True)]
        return [(self._codec.encode_group([self._placed(self.plan[index]) for index in indices]), sum(sizes))]

    def frame(self, index: int) -> bytes:
        """The message that carries a chunk."""
        chunk = self.plan[index]
        if self._placement is not None:
            return self._codec.encode(self._placed(chunk), ())
        data: Sequence[Any] = [host_bytes(part) for part in self._tensors(chunk)]
        return self._codec.encode(_header(chunk, self._digest(data)), data)

    def _placed(self, chunk: PlannedChunk) -> ChunkFrame:
        """Brings a chunk to its place in the segment."""
        assert self._placement is not None
        segments = self._segments(chunk)
        checksum = self._placement.write(chunk.layer, chunk.kind, chunk.token_start, segments, self._ready(chunk))
        return _header(chunk, checksum)

    def _segments(self, chunk: PlannedChunk) -> list[torch.Tensor]:
        end = chunk.token_start + chunk.num_tokens
        return self._kv.segments(chunk.layer, chunk.kind, chunk.token_start, end)

    def _ready(self, chunk: PlannedChunk) -> object:
        return self._kv.written(chunk.layer)

    def _tensors(self, chunk: PlannedChunk) -> list[torch.Tensor]:
        """The chunk in its layout, in pieces that follow each other."""
        segments = self._segments(chunk)
        if self._layout is Layout.THD:
            return segments
        return [(torch.cat(segments) if len(segments) > 1 else segments[0]).transpose(0, 1)]


def _header(chunk: PlannedChunk, checksum: int) -> ChunkFrame:
    return ChunkFrame(chunk.index, chunk.layer, chunk.kind + 1, chunk.token_start, chunk.num_tokens, checksum, b"")


def host_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as one flat buffer in host memory; a view where they are there in order."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
