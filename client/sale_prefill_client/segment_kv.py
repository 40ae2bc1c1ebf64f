"""KV streams whose bytes are in a segment: chunks come and go without data, and say that it is in its place."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sale_prefill.kv_frames import PUSH_FRAMES, ChunkFrame
from sale_prefill.v1 import kv_pb2

from .cuda_segments import CudaSegment, DeviceKvCache, Segment
from .errors import ProtocolError
from .extras import require
from .kv import KvCache
from .kv_assembly import KvAssembler
from .kv_chunks import KvChunks, Runs
from .options import Checksum, Layout, Range
from .segments import digest_in_place, put_in_place
from .tokens import TokenIds

if TYPE_CHECKING:
    from torch import Tensor

_Placed = tuple[ChunkFrame | kv_pb2.KvChunk, npt.NDArray[np.uint8]]

#: Bytes of a push that one message announces: costs one message for them, and has the server begin early.
_GROUP_BYTES = 8 * 2**20


#: Threads that verify digests: one core does 13 GB/s with xxh3_64, a GPU's memory is copied at 50.
_VERIFIERS = max(1, min(4, (os.cpu_count() or 2) // 2))


class SegmentAssembler(KvAssembler):
    """Assembles a pull through a segment: nothing is copied, and the cache views the segment.

    Digests are verified where the bytes are, by threads of its own while later chunks are announced; `finish` waits
    for that. Close it in the end.

    Args:
        segment: which the stream names.
        session_id, token_range, layer_range, layout, checksum: as of `KvAssembler`.
    """

    def __init__(
        self,
        segment: Segment,
        session_id: str,
        *,
        token_range: Range | None,
        layer_range: Range | None,
        layout: Layout,
        checksum: Checksum,
    ) -> None:
        super().__init__(session_id, token_range=token_range, layer_range=layer_range, layout=layout, checksum=checksum)
        self._segment = segment
        self._verifier = ThreadPoolExecutor(_VERIFIERS, "sale-prefill-verify")
        self._unverified: list[_Placed] = []
        self._verifying: deque[Future[None]] = deque()
        if isinstance(segment, CudaSegment):
            self._cache_class = DeviceKvCache

    def _memory(self, shape: tuple[int, ...]) -> Any:
        return self._segment.array(shape)

    def _take(self, chunk: ChunkFrame | kv_pb2.KvChunk, place: npt.NDArray[np.uint8], num_bytes: int) -> None:
        if len(chunk.data):
            raise ProtocolError(f"KV chunk {chunk.index} has data beside its segment; pull again")
        if self._checksum != "none":
            self._unverified.append((chunk, place))

    def add_chunk(self, chunk: ChunkFrame | kv_pb2.KvChunk) -> None:
        """Check a chunk's header, and have its bytes verified.

        Raises:
            ChecksumMismatchError: an earlier chunk's bytes differ from their checksum; metadata: chunk_index.
            ProtocolError: missing, repeated, out of order, out of range, or with data.
        """
        super().add_chunk(chunk)
        self._verify_on()

    def add_chunks(self, chunks: Sequence[ChunkFrame]) -> None:
        """The same for several chunks, in order."""
        for chunk in chunks:
            super().add_chunk(chunk)
        self._verify_on()

    def _verify_on(self) -> None:
        if self._unverified:
            self._verifying.append(self._verifier.submit(self._verify, self._unverified))
            self._unverified = []
        while self._verifying and self._verifying[0].done():
            self._verifying.popleft().result()

    def _verify(self, chunks: list[_Placed]) -> None:
        for chunk, place in chunks:
            self._check_digest(chunk, digest_in_place(place, self._checksum))

    def finish(self) -> KvCache:
        """The whole cache, after the last chunk, every digest verified; waits for that.

        Raises:
            ChecksumMismatchError: a chunk differs from its checksum.
            ProtocolError: the stream ended early.
        """
        while self._verifying:
            self._verifying.popleft().result()
        return super().finish()

    def close(self) -> None:
        """Verifies no more."""
        self._verifier.shutdown(wait=False, cancel_futures=True)


class SegmentChunks(KvChunks):
    """The chunks of a push through a segment. Their bytes are brought there as they are announced, unless the cache is
    the segment's beginning already.

    Args:
        segment: which the stream names.
        cache, token_ids, chunk_bytes, checksum: as of `KvChunks`.

    Raises:
        ValueError: as `KvChunks`; or the cache does not fit, or is another part of the segment.
    """

    def __init__(
        self,
        segment: Segment,
        cache: KvCache,
        token_ids: TokenIds | None,
        chunk_bytes: int,
        checksum: Checksum,
    ) -> None:
        super().__init__(cache, token_ids, chunk_bytes, checksum)
        self.transfer_id = segment.transfer_id
        self._target: Any = segment.array(cache.buffer.shape)
        self._on_device = isinstance(segment, CudaSegment)
        self._in_place = False
        if isinstance(segment, CudaSegment):
            _copy_to_device(segment.array(cache.buffer.shape), cache.buffer)
        else:
            self._in_place = segment.has(cache.buffer)

    def frames(self, runs: Runs) -> Iterator[tuple[bytes, int]]:
        """Messages of the chunks in half-open runs of indices, several in each, with the bytes of KV that are in place
        by then."""
        group: list[ChunkFrame] = []
        num_bytes = 0
        for start, end in runs:
            for index in range(start, end):
                frame = self._placed(index)
                group.append(frame)
                num_bytes += frame.num_tokens * self._token_bytes
                if num_bytes >= _GROUP_BYTES:
                    yield PUSH_FRAMES.encode_group(group), num_bytes
                    group, num_bytes = [], 0
        if group:
            yield PUSH_FRAMES.encode_group(group), num_bytes

    def _placed(self, index: int) -> ChunkFrame:
        """Brings a chunk to its place."""
        layer, kind, start, count = self._place(index)
        checksum = 0
        if not self._on_device:
            place = self._part(self._target, layer, kind, start, count)
            if self._in_place:
                checksum = digest_in_place(place, self._checksum)
            else:
                checksum = put_in_place(
                    place, self._part(self._cache.buffer, layer, kind, start, count), self._checksum
                )
        return ChunkFrame(index, layer, kind + 1, start, count, checksum, b"")


def _copy_to_device(target: Tensor, source: Any) -> None:
    """Brings KV to a segment of device memory, unless it is there, and waits for the end of that."""
    torch = require("torch", extra="torch", purpose="KV in device memory")
    tensor = torch.as_tensor(source)
    if tensor.data_ptr() != target.data_ptr():
        target.copy_(tensor)
    torch.cuda.synchronize(target.device)
