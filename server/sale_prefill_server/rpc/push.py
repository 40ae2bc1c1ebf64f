"""The streams of PushKv: chunks in, a session when all are there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future

from sale_prefill.kv_frames import (
    MANIFEST_DIGEST_KEY,
    PUSH_FRAMES,
    ChunkFrame,
    FrameError,
    group_frames,
    message_digest,
)
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.transfer.kv_writer import InOrder
from sale_prefill_server.transfer.read_ahead import BATCH_BYTES, stopped
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.uploads import Upload, Uploads


def decoded(raw: bytes) -> list[ChunkFrame] | pb.PushKvRequest:
    """One message of a push: chunks, or another one.

    Raises:
        PrefillError: INVALID_FIELD, it is none.
    """
    try:
        message: ChunkFrame | pb.PushKvRequest = PUSH_FRAMES.decode(raw)
    except FrameError as error:
        raise invalid_field("frame", f"{error}: the stream is broken, send it again") from error
    if isinstance(message, ChunkFrame):
        return [message]
    return group_frames(message.chunks) if message.HasField("chunks") else message


async def read_header(requests: AsyncIterator[bytes], metadata: dict[str, str | bytes]) -> pb.PushKvHeader:
    """The first message of a push.

    Raises:
        PrefillError: INVALID_FIELD, another one came first; CHECKSUM_MISMATCH, it differs from its digest.
    """
    raw = await anext(aiter(requests), None)
    first = None if raw is None else decoded(raw)
    if raw is None or not isinstance(first, pb.PushKvRequest) or not first.HasField("header"):
        raise invalid_field("header", "is missing: it comes first in the stream")
    expected = message_digest(raw)
    if metadata.get(MANIFEST_DIGEST_KEY, expected) != expected:
        raise PrefillError(
            Reason.CHECKSUM_MISMATCH, "the header differs from its digest: send the stream again", field="header"
        )
    return first.header


class PushStream:
    """Takes one stream's chunks, a batch in a thread while the next is read.

    Args:
        uploads: owner of `upload`.
        upload: where the chunks go.
        segment: where their bytes are; in the messages where left out.
        executor: threads that check and copy.
    """

    def __init__(self, uploads: Uploads, upload: Upload, segment: SegmentPlacement | None, executor: Executor) -> None:
        self._uploads = uploads
        self._upload = upload
        self._segment = segment
        self._executor = executor
        self.num_chunks = 0
        self.num_bytes = 0

    async def take(self, requests: AsyncIterator[bytes]) -> None:
        """Reads the stream to its end.

        Raises:
            PrefillError: what `KvWriter.take` refuses, or a message that is no chunk.
        """
        order, batch, batch_bytes = InOrder(), list[ChunkFrame](), 0
        writing: Future[int] | None = None
        try:
            async for raw in requests:
                frames = decoded(raw)
                if not isinstance(frames, list):
                    raise invalid_field("header", "came twice: chunks follow the first one")
                batch += map(order.check, frames)
                batch_bytes += sum(map(self._upload.writer.num_bytes, frames))
                self._uploads.touch(self._upload)
                # A message of a segment's is small, and what it speaks of may be megabytes.
                if batch_bytes >= BATCH_BYTES or (self._segment is not None and (writing is None or writing.done())):
                    await self._written(writing)
                    writing = self._write(batch)
                    batch, batch_bytes = [], 0
            await self._written(writing)
            writing = self._write(batch) if batch else None
            await self._written(writing)
        finally:
            await stopped(writing)

    def _write(self, batch: list[ChunkFrame]) -> Future[int]:
        self.num_chunks += len(batch)
        return self._executor.submit(self._upload.writer.take, batch, self._segment)

    async def _written(self, writing: Future[int] | None) -> None:
        if writing is not None:
            self.num_bytes += await asyncio.wrap_future(writing)
            self._uploads.settle(self._upload)
