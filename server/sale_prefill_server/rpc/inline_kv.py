"""KV within a prefill's stream: each layer's is sent while later ones are computed."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack, aclosing, suppress

from sale_prefill.kv_frames import PREFILL_FRAMES
from sale_prefill.v1 import kv_pb2
from sale_prefill.v1 import prefill_service_pb2 as pb
from sale_prefill_server.errors import invalid_field
from sale_prefill_server.events import EventBus, KvTransferred
from sale_prefill_server.kv.pool import SessionKv
from sale_prefill_server.rpc.convert import Converter
from sale_prefill_server.rpc.kv_messages import (
    checksum_of,
    checksum_value,
    chunk_bytes_of,
    layout_of,
    layout_value,
    range_message,
    range_of,
    require_spec,
)
from sale_prefill_server.sessions.session import token_digest
from sale_prefill_server.transfer.chunks import ChunkPlan, resolve_range
from sale_prefill_server.transfer.kv_reader import KvReader
from sale_prefill_server.transfer.read_ahead import BATCH_BYTES, SEGMENT_BATCH_BYTES, SEGMENT_WRITERS
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.segments import SegmentBroker


class InlineStreams:
    """Opens the KV part of prefills.

    Args:
        converter: messages.
        events: told of each stream.
        executor: threads that copy and digest chunks.
        segments: memory beside gRPC.
        max_message_bytes: the server's limit; a chunk may have half of it.
        chunk_tokens: the engine's prefill chunk: KV of a chunk goes out in all layers before that of the next.
    """

    def __init__(
        self,
        converter: Converter,
        events: EventBus,
        executor: Executor,
        segments: SegmentBroker,
        max_message_bytes: int,
        chunk_tokens: int,
    ) -> None:
        self._converter = converter
        self.events = events
        self.executor = executor
        self._segments = segments
        self._max_chunk_bytes = max_message_bytes // 2
        self._chunk_tokens = chunk_tokens

    def check(self, asked: pb.InlineKv) -> None:
        """What can be refused before anything is computed.

        Raises:
            PrefillError: INVALID_FIELD, KV_SPEC_MISMATCH.
        """
        layout = layout_of(asked.layout, "inline_kv.layout")
        checksum_of(asked.checksum_algorithm, "inline_kv.checksum_algorithm")
        self._chunk_bytes(asked)
        require_spec(self._converter.kv_spec(layout_value(layout)), asked.expected_spec, "inline_kv.expected_spec")

    def _chunk_bytes(self, asked: pb.InlineKv) -> int:
        return chunk_bytes_of(asked.chunk_bytes, self._max_chunk_bytes, in_segment=bool(asked.transfer_id))

    def open(self, asked: pb.InlineKv, tenant: str, tokens: array[int], kv: SessionKv) -> InlineStream:
        """A stream of the KV that `kv` gets. The caller closes it.

        Args:
            asked: of a request that `check` let pass.
            tenant: of the caller.
            tokens: all that the session holds when the prefill is done.
            kv: with a reference that becomes the stream's.

        Raises:
            PrefillError: INVALID_FIELD, TRANSFER_UNKNOWN.
        """
        stack = ExitStack()
        kept = _Kept(kv)
        stack.callback(kept.release)
        try:
            layout, checksum = layout_of(asked.layout), checksum_of(asked.checksum_algorithm)
            range_ = resolve_range(range_of(asked.range), kv.shape, len(tokens))
            step = self._chunk_tokens
            boundaries = range(range_.token_start // step * step + step, range_.token_end, step)
            plan = ChunkPlan(range_, kv.shape, self._chunk_bytes(asked), boundaries)
            if asked.resume_from_chunk > plan.total_chunks:
                raise invalid_field(
                    "inline_kv.resume_from_chunk",
                    f"{asked.resume_from_chunk}: the stream has {plan.total_chunks} chunks",
                )
            place, transport = None, "grpc"
            if asked.transfer_id:
                segment = stack.enter_context(self._segments.borrow(tenant, asked.transfer_id))
                place, transport = SegmentPlacement(segment, kv.shape, range_, layout, checksum), segment.transport
        except BaseException:
            stack.close()
            raise
        manifest = kv_pb2.KvManifest(
            spec=self._converter.kv_spec(layout_value(layout)),
            range=range_message(range_),
            total_bytes=plan.total_bytes,
            total_chunks=plan.total_chunks,
            checksum_algorithm=checksum_value(checksum),
            token_digest=token_digest(tokens[: range_.token_end]),
        )

        def reader(kv: SessionKv) -> KvReader:
            return KvReader(kv, plan, layout, checksum, PREFILL_FRAMES, place)

        return InlineStream(self, kept, plan, reader, manifest, asked.resume_from_chunk, str(transport), stack)


class _Kept:
    """The one reference of a stream to the KV that it reads."""

    def __init__(self, kv: SessionKv) -> None:
        self.kv = kv

    def replace(self, kv: SessionKv) -> None:
        self.kv.release()
        self.kv = kv

    def release(self) -> None:
        self.kv.release()


class InlineStream:
    """One prefill's KV as frames, in the order in which it is computed. Owns its reference and its segment."""

    def __init__(
        self,
        owner: InlineStreams,
        kept: _Kept,
        plan: ChunkPlan,
        reader: Callable[[SessionKv], KvReader],
        manifest: kv_pb2.KvManifest,
        first_chunk: int,
        transport: str,
        stack: ExitStack,
    ) -> None:
        self._owner = owner
        self._kept = kept
        self._plan = plan
        self._reader = reader
        self.manifest = manifest
        self._next = first_chunk
        self._transport = transport
        self._stack = stack
        self._started = time.perf_counter()
        self._sent_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def go_on_with(self, kv: SessionKv) -> None:
        """The job was admitted anew, maybe with a session of its own; what was sent holds. Takes over a reference."""
        self._kept.replace(kv)
        self._changed.set()

    async def frames(self) -> AsyncIterator[bytes]:
        """Every chunk as soon as it is there."""
        while self._next < self._plan.total_chunks:
            kv = self._kept.kv
            with kv.watched(self._wake):
                async with aclosing(self._frames_of(kv)) as frames:
                    async for frame in frames:
                        yield frame

    async def _frames_of(self, kv: SessionKv) -> AsyncGenerator[bytes, None]:
        """Until all were sent, or the stream goes on with other KV; some batches are made while one is sent."""
        in_segment = self._transport != "grpc"
        batch_bytes, most = (SEGMENT_BATCH_BYTES, SEGMENT_WRITERS) if in_segment else (BATCH_BYTES, 1)
        batch, total = max(1, batch_bytes // self._plan.chunk_bytes), self._plan.total_chunks
        reader, making, asked = self._reader(kv), deque[tuple[int, Future[list[bytes]]]](), self._next
        try:
            while self._next < total and kv is self._kept.kv:
                self._changed.clear()
                while len(making) <= most and (end := self._ready_until(kv, asked, asked + batch)) > asked:
                    making.append((end, self._submit(kv, reader, asked, end)))
                    asked = end
                if not making:
                    await self._changed.wait()
                    continue
                end, made = making.popleft()
                frames: list[bytes] = await asyncio.wrap_future(made)
                for index, frame in enumerate(frames, self._next):
                    yield frame
                    self._sent_bytes += self._plan.num_bytes(index)
                self._next = end
        finally:
            for _, made in making:
                made.cancel()

    def _submit(self, kv: SessionKv, reader: KvReader, start: int, end: int) -> Future[list[bytes]]:
        kv.acquire()  # while a thread reads, whatever becomes of the stream
        making = self._owner.executor.submit(lambda: [reader.frame(index) for index in range(start, end)])
        making.add_done_callback(lambda _: kv.release())
        return making

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there to wake
            self._loop.call_soon_threadsafe(self._changed.set)

    def _ready_until(self, kv: SessionKv, index: int, most: int) -> int:
        """The first chunk from `index` on that is not there yet, `most` at most."""
        if kv.is_loading:
            return index
        while index < min(most, self._plan.total_chunks):
            chunk = self._plan[index]
            if kv.length(chunk.layer) < chunk.token_start + chunk.num_tokens:
                break
            index += 1
        return index

    def close(self) -> None:
        """Lets the KV and the segment go."""
        self._stack.close()
        failure = "" if self._next == self._plan.total_chunks else "cancelled"
        seconds = time.perf_counter() - self._started
        self._owner.events.emit(KvTransferred("inline", self._transport, self._sent_bytes, seconds, failure))


async def merged(
    events: AsyncIterator[object], frames: AsyncIterator[bytes], is_last: Callable[[object], bool]
) -> AsyncIterator[object]:
    """Events and frames as they come; the last event after all frames. An error of either ends both."""
    queue: asyncio.Queue[tuple[object, BaseException | None]] = asyncio.Queue(1)
    end = object()

    async def pump(source: AsyncIterator[object]) -> None:
        try:
            async for item in source:
                await queue.put((item, None))
            await queue.put((end, None))
        except Exception as error:
            await queue.put((None, error))

    tasks = [asyncio.create_task(pump(source)) for source in (events, frames)]
    last, ended = None, 0
    try:
        while ended < len(tasks):
            item, error = await queue.get()
            if error is not None:
                raise error
            if item is end:
                ended += 1
            elif is_last(item):
                last = item
            else:
                yield item
        if last is not None:
            yield last
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
