"""Reads chunks of a session's KV as frames of a stream. Copies from the device: call it off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sale_prefill.kv_frames import ChunkFrame, FrameCodec
from sale_prefill_server.kv.pool import SessionKv
from sale_prefill_server.transfer.checksums import CHECKSUMS, Checksum
from sale_prefill_server.transfer.chunks import ChunkPlan, Layout, PlannedChunk
from sale_prefill_server.transfer.placement import SegmentView


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
        placement: SegmentView | None = None,
    ) -> None:
        self._kv = kv
        self.plan = plan
        self._layout = layout
        self._digest = CHECKSUMS[checksum]
        self._has_checksum = checksum is not Checksum.NONE
        self._codec = codec
        self._placement = placement

    def frame(self, index: int) -> bytes:
        """The message that carries a chunk."""
        chunk = self.plan[index]
        parts = self._tensors(chunk)
        if self._placement is None:
            data: Sequence[Any] = [host_bytes(part) for part in parts]
        else:
            place = self._placement.chunk(chunk)
            place.copy_(torch.cat(parts) if len(parts) > 1 else parts[0])
            data = [host_bytes(place)] if self._has_checksum else []
        header = ChunkFrame(
            index, chunk.layer, chunk.kind + 1, chunk.token_start, chunk.num_tokens, self._digest(data), b""
        )
        return self._codec.encode(header, data if self._placement is None else ())

    def _tensors(self, chunk: PlannedChunk) -> list[torch.Tensor]:
        """The chunk in its layout, in pieces that follow each other."""
        segments = self._kv.segments(chunk.layer, chunk.kind, chunk.token_start, chunk.token_start + chunk.num_tokens)
        if self._layout is Layout.THD:
            return segments
        return [(torch.cat(segments) if len(segments) > 1 else segments[0]).transpose(0, 1)]


def host_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as one flat buffer in host memory; a view where they are there in order."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
