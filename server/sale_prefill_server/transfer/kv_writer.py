"""Puts chunks of pushed KV in their place, trusting nothing that they say."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from sale_prefill.kv_frames import ChunkFrame
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.kv.pool import KvShape, SessionKv
from sale_prefill_server.transfer.checksums import CHECKSUMS, Checksum
from sale_prefill_server.transfer.chunks import (
    MAXIMUM_SEGMENT_CHUNK_BYTES,
    KvRange,
    Layout,
    PlannedChunk,
    layer_token_bytes,
)
from sale_prefill_server.transfer.kv_reader import host_bytes
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.segments import Segment

Place = tuple[int, int, int, int]


class KvWriter:
    """Takes the chunks of one import, in any order, from any thread.

    A chunk may have any number of tokens; taken together, each token of each layer's K and V comes exactly once. A
    chunk that comes again as it was, from a stream that goes on where another broke, is passed over.

    Args:
        kv: has room for `num_tokens`; a reference is held while a chunk is written.
        num_tokens: tokens of the session.
        layout: axis order of the chunks.
        checksum: digest of each chunk.
        total_chunks: how many there are.
    """

    def __init__(self, kv: SessionKv, num_tokens: int, layout: Layout, checksum: Checksum, total_chunks: int) -> None:
        self._kv = kv
        self._shape: KvShape = kv.shape
        self._num_tokens = num_tokens
        self._layout = layout
        self._checksum = checksum
        self._lock = threading.Lock()
        self._places: dict[int, Place] = {}
        self._arrived = np.zeros(total_chunks, bool)
        self._covered = np.zeros((self._shape.num_layers, 2, num_tokens), bool)
        self._closed = False

    @property
    def complete(self) -> bool:
        """Every chunk is in place, and with them every byte.

        Raises:
            PrefillError: INVALID_FIELD, there is no chunk left and some bytes are still missing.
        """
        with self._lock:
            if not self._arrived.all():
                return False
            uncovered = 0 if self._covered.all() else int((~self._covered).sum())
        if uncovered:
            raise invalid_field(
                "manifest.total_chunks",
                f"all {self._arrived.size} chunks came, and {uncovered} tokens of layers' keys or values did not",
            )
        return True

    def missing(self) -> list[tuple[int, int]]:
        """Chunks that have not arrived, as half-open runs in order."""
        with self._lock:
            edges = np.flatnonzero(np.diff(np.concatenate(([False], ~self._arrived, [False])).astype(np.int8)))
        return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]

    def placed_in(self, segment: Segment) -> SegmentPlacement:
        """The import's KV in a segment.

        Raises:
            PrefillError: INVALID_FIELD, the segment is too small.
        """
        whole = KvRange(0, self._num_tokens, 0, self._shape.num_layers)
        return SegmentPlacement(segment, self._shape, whole, self._layout, self._checksum)

    def take(self, frames: Sequence[ChunkFrame], segment: SegmentPlacement | None = None) -> int:
        """Checks chunks and writes them. Copies to the device: call it off the event loop.

        Args:
            frames: the chunks.
            segment: where their bytes are; in the frames themselves where left out.

        Returns:
            Bytes written.

        Raises:
            PrefillError: CHECKSUM_MISMATCH, INVALID_FIELD (out of place, of the wrong size, or come before as another
                one), TRANSFER_UNKNOWN (the upload has ended).
        """
        return sum(self._take_one(frame, segment) for frame in frames)

    def close(self) -> None:
        """Takes no more chunks; one that is being written still holds the memory."""
        with self._lock:
            self._closed = True

    def _take_one(self, frame: ChunkFrame, segment: SegmentPlacement | None) -> int:
        chunk = self._checked_place(frame, segment is not None)
        tokens = self._from_message(frame, chunk) if segment is None else None
        if not self._claim(chunk):
            return 0
        try:
            if segment is not None:
                tokens = self._from_segment(frame, chunk, segment)
            if tokens is not None:
                self._kv.write(chunk.layer, chunk.kind, chunk.token_start, tokens)
        except BaseException:
            self._unclaim(chunk)
            raise
        finally:
            self._kv.release()
        with self._lock:
            self._arrived[chunk.index] = True
        return self.num_bytes(frame)

    def num_bytes(self, frame: ChunkFrame) -> int:
        """Bytes that a chunk says to have."""
        return frame.num_tokens * layer_token_bytes(self._shape)

    def _checked_place(self, frame: ChunkFrame, in_segment: bool) -> PlannedChunk:
        name = f"chunk {frame.index} (layer {frame.layer}, kind {frame.kind})"
        if frame.index >= self._arrived.size:
            raise invalid_field("chunk.index", f"{frame.index}: the manifest has {self._arrived.size} chunks")
        if frame.layer >= self._shape.num_layers or frame.kind not in (1, 2):
            raise invalid_field("chunk.layer", f"{name} is outside the model's {self._shape.num_layers} layers")
        if not frame.num_tokens or frame.token_start + frame.num_tokens > self._num_tokens:
            raise invalid_field(
                "chunk.num_tokens",
                f"{name} holds {frame.num_tokens} tokens from {frame.token_start} of a session of {self._num_tokens}",
            )
        if len(frame.data) and in_segment:
            raise invalid_field("chunk.data", f"{name} has data beside its segment: send one of them")
        if in_segment and self.num_bytes(frame) > MAXIMUM_SEGMENT_CHUNK_BYTES:
            raise invalid_field(
                "chunk.num_tokens",
                f"{name} has {self.num_bytes(frame)} bytes; send {MAXIMUM_SEGMENT_CHUNK_BYTES} at most",
            )
        return PlannedChunk(frame.index, frame.layer, frame.kind - 1, frame.token_start, frame.num_tokens)

    def _from_message(self, frame: ChunkFrame, chunk: PlannedChunk) -> torch.Tensor:
        """[num_tokens, kv_heads, head_dim], sharing the message's memory."""
        data = torch.from_numpy(_writable(frame.data))
        wanted_bytes = self.num_bytes(frame)
        if data.nbytes != wanted_bytes:
            raise invalid_field(
                "chunk.data",
                f"chunk {frame.index} holds {data.nbytes} bytes; its {chunk.num_tokens} tokens are {wanted_bytes}",
            )
        if self._checksum is not Checksum.NONE:
            self._check_digest(frame, CHECKSUMS[self._checksum]([host_bytes(data)]))
        return self._tokens_first(data, chunk.num_tokens)

    def _from_segment(self, frame: ChunkFrame, chunk: PlannedChunk, segment: SegmentPlacement) -> torch.Tensor | None:
        """Takes the chunk to host memory of our own and digests it there, since the peer can still write the segment.

        Returns:
            The chunk; None where it went to its pages at once, which nobody reads before the last chunk is there.
        """
        place = (chunk.layer, chunk.kind, chunk.token_start)
        tokens = None
        if self._shape.device.type == "cpu":
            pages = self._kv.segments(*place, chunk.token_start + chunk.num_tokens)
            digest = segment.take(*place, pages)
        else:
            tokens, digest = segment.take_copy(*place, chunk.num_tokens)
        self._check_digest(frame, digest)
        return tokens

    def _check_digest(self, frame: ChunkFrame, digest: int) -> None:
        if self._checksum is not Checksum.NONE and digest != frame.checksum:
            raise PrefillError(
                Reason.CHECKSUM_MISMATCH,
                f"chunk {frame.index} (layer {frame.layer}, tokens from {frame.token_start}) differs from its "
                f"{self._checksum} checksum: send it again",
                metadata={"chunk_index": frame.index},
            )

    def _claim(self, chunk: PlannedChunk) -> bool:
        """Takes the chunk's place and a reference to the KV; False where it has come before.

        Raises:
            PrefillError: another chunk has the number or the place, or the upload has ended.
        """
        place: Place = (chunk.layer, chunk.kind, chunk.token_start, chunk.num_tokens)
        with self._lock:
            if self._closed:
                raise PrefillError(
                    Reason.TRANSFER_UNKNOWN, "the upload has ended: open it again to see what is missing"
                )
            earlier = self._places.get(chunk.index)
            if earlier == place:
                return False
            if earlier is not None:
                raise invalid_field("chunk.index", f"chunk {chunk.index} came before, for another place")
            covered = self._covered[chunk.layer, chunk.kind, chunk.token_start : chunk.token_start + chunk.num_tokens]
            if covered.any():
                raise invalid_field(
                    "chunk.token_start",
                    f"chunk {chunk.index} brings tokens from {chunk.token_start} of layer {chunk.layer} that another "
                    "chunk has brought",
                )
            self._kv.acquire()
            covered[:] = True
            self._places[chunk.index] = place
        return True

    def _unclaim(self, chunk: PlannedChunk) -> None:
        with self._lock:
            del self._places[chunk.index]
            self._covered[chunk.layer, chunk.kind, chunk.token_start : chunk.token_start + chunk.num_tokens] = False

    def _tokens_first(self, data: torch.Tensor, num_tokens: int) -> torch.Tensor:
        rows = (num_tokens, self._shape.num_kv_heads)
        axes = rows if self._layout is Layout.THD else rows[::-1]
        tensor = data.contiguous().view(-1).view(self._shape.dtype).view(*axes, self._shape.head_dim)
        return tensor if self._layout is Layout.THD else tensor.transpose(0, 1)


class InOrder:
    """Chunks of one stream, whose numbers must grow: one that comes late or again is refused."""

    def __init__(self) -> None:
        self._next_index = 0

    def check(self, frame: ChunkFrame) -> ChunkFrame:
        """The chunk itself.

        Raises:
            PrefillError: INVALID_FIELD.
        """
        if frame.index < self._next_index:
            raise invalid_field(
                "chunk.index", f"chunk {frame.index} came after chunk {self._next_index - 1} of the same stream"
            )
        self._next_index = frame.index + 1
        return frame


class _Writable:
    """torch wants writable memory to read from; this says that a message's bytes are."""

    def __init__(self, data: memoryview | bytes) -> None:
        array = np.frombuffer(data, np.uint8)
        self._kept = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _writable(data: memoryview | bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(_Writable(data)) if len(data) else np.empty(0, np.uint8)
