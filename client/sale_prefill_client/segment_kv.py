"""KV streams whose bytes are in a segment: chunks come and go without data, and say that it is in its place."""

from __future__ import annotations

from collections import deque
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
from .kv_chunks import KvChunks
from .options import Checksum, Layout, Range
from .segments import digest_in_place, put_in_place
from .tokens import TokenIds

if TYPE_CHECKING:
    from torch import Tensor


class SegmentAssembler(KvAssembler):
    """Assembles a pull through a segment: nothing is copied, and the cache views the segment.

    Digests are verified where the bytes are, by a thread of its own while later chunks are announced; `finish` waits
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
        self._verifier = ThreadPoolExecutor(1, "sale-prefill-verify")
        self._verifying: deque[Future[None]] = deque()
        if isinstance(segment, CudaSegment):
            self._cache_class = DeviceKvCache

    def _memory(self, shape: tuple[int, ...]) -> Any:
        return self._segment.array(shape)

    def _take(self, chunk: ChunkFrame | kv_pb2.KvChunk, place: npt.NDArray[np.uint8], num_bytes: int) -> None:
        if len(chunk.data):
            raise ProtocolError(f"KV chunk {chunk.index} has data beside its segment; pull again")
        if self._checksum != "none":
            self._verifying.append(self._verifier.submit(self._verify, chunk, place))
            while self._verifying and self._verifying[0].done():
                self._verifying.popleft().result()

    def _verify(self, chunk: ChunkFrame | kv_pb2.KvChunk, place: npt.NDArray[np.uint8]) -> None:
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

    def _frame(self, index: int) -> tuple[bytes, int]:
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
        frame = PUSH_FRAMES.encode(ChunkFrame(index, layer, kind + 1, start, count, checksum, b""), ())
        return frame, count * self._token_bytes


def _copy_to_device(target: Tensor, source: Any) -> None:
    """Brings KV to a segment of device memory, unless it is there, and waits for the end of that."""
    torch = require("torch", extra="torch", purpose="KV in device memory")
    tensor = torch.as_tensor(source)
    if tensor.data_ptr() != target.data_ptr():
        target.copy_(tensor)
    torch.cuda.synchronize(target.device)
