"""KvTransferService: KV bytes out of sessions and into new ones."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor
from contextlib import ExitStack, aclosing
from functools import partial

import grpc

from sale_prefill.kv_frames import MANIFEST_DIGEST_KEY, PULL_FRAMES, keep_freed_memory, message_digest
from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2_grpc
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.events import EventBus, KvTransferred
from sale_prefill_server.rpc.convert import Converter, required_identifier
from sale_prefill_server.rpc.interceptor import current_caller
from sale_prefill_server.rpc.kv_messages import (
    checksum_of,
    chunk_bytes_of,
    import_command,
    layout_of,
    layout_value,
    manifest_message,
    range_of,
    require_spec,
)
from sale_prefill_server.rpc.push import PushStream, read_header
from sale_prefill_server.rpc.residency import brought_back
from sale_prefill_server.rpc.transfer_calls import TransferCalls
from sale_prefill_server.scheduler.admission import Admission
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Session, SessionState
from sale_prefill_server.transfer.chunks import ChunkPlan, resolve_range
from sale_prefill_server.transfer.kv_reader import KvReader
from sale_prefill_server.transfer.read_ahead import (
    BATCH_BYTES,
    SEGMENT_BATCH_BYTES,
    SEGMENT_WRITERS,
    read_ahead,
)
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.segments import Segment, SegmentBroker
from sale_prefill_server.transfer.uploads import Upload, Uploads


class KvTransferServicer(TransferCalls, kv_transfer_service_pb2_grpc.KvTransferServiceServicer):
    """Serves KV bytes in gRPC messages.

    Args:
        manager: sessions.
        admission: brings KV back that is not on the device.
        converter: messages.
        events: told of each stream.
        executor: threads that copy and digest chunks.
        segments: memory beside gRPC.
        uploads: pushes under way.
        max_message_bytes: the server's limit; a chunk may have half of it.
    """

    def __init__(
        self,
        manager: SessionManager,
        admission: Admission,
        converter: Converter,
        events: EventBus,
        executor: Executor,
        segments: SegmentBroker,
        uploads: Uploads,
        max_message_bytes: int,
    ) -> None:
        keep_freed_memory()
        self._manager = manager
        self._admission = admission
        self._converter = converter
        self._events = events
        self._executor = executor
        self._segments = segments
        self._uploads = uploads
        self._max_chunk_bytes = max_message_bytes // 2

    async def PullKv(  # noqa: N802
        self, request: pb.PullKvRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        """Manifest, then chunks. The stream reads one generation; later appends do not disturb it."""
        session = self._readable_session(request)
        await brought_back(self._admission, session)
        session = self._readable_session(request)  # it may have changed meanwhile
        kv = session.sequence.kv.acquire()
        started, sent_bytes, failure, transport = time.perf_counter(), 0, "cancelled", "grpc"
        try:
            with ExitStack() as stack:
                segment = None
                if request.transfer_id:
                    segment = stack.enter_context(self._segments.borrow(session.tenant, request.transfer_id))
                    transport = segment.transport
                reader, manifest = self._open(request, session, segment)
                first = pb.PullKvResponse(manifest=manifest).SerializeToString()
                await context.send_initial_metadata(((MANIFEST_DIGEST_KEY, message_digest(first)),))
                yield first
                async with aclosing(self._frames(reader, request, in_segment=segment is not None)) as frames:
                    async for frame, num_bytes in frames:
                        yield frame
                        sent_bytes += num_bytes
            failure = ""
        except PrefillError as error:
            failure = str(error.reason).lower()
            raise
        finally:
            kv.release()
            self._events.emit(KvTransferred("pull", transport, sent_bytes, time.perf_counter() - started, failure))

    def _frames(
        self, reader: KvReader, request: pb.PullKvRequest, *, in_segment: bool
    ) -> AsyncGenerator[tuple[bytes, int], None]:
        batch_bytes, ahead = (SEGMENT_BATCH_BYTES, SEGMENT_WRITERS) if in_segment else (BATCH_BYTES, 1)
        plan = reader.plan
        return read_ahead(
            partial(reader.frames, grouped=in_segment and request.group_chunks),
            request.resume_from_chunk,
            plan.total_chunks,
            executor=self._executor,
            batch_chunks=max(1, batch_bytes // plan.chunk_bytes),
            ahead=ahead,
        )

    def _readable_session(self, request: pb.PullKvRequest) -> Session:
        session = self._manager.get(current_caller().tenant, required_identifier("session_id", request.session_id))
        if session.state is SessionState.BUSY:
            raise PrefillError(
                Reason.SESSION_BUSY,
                f"session {session.session_id!r} is busy with another request: pull its KV when that is done",
                metadata={"session_id": session.session_id},
            )
        if request.generation not in (0, session.generation):
            raise PrefillError(
                Reason.GENERATION_MISMATCH,
                f"session {session.session_id!r} is at generation {session.generation}, the request wants "
                f"{request.generation}: start the pull again",
                metadata={"generation": session.generation},
                field="generation",
            )
        return session

    def _open(
        self, request: pb.PullKvRequest, session: Session, segment: Segment | None
    ) -> tuple[KvReader, kv_pb2.KvManifest]:
        layout, checksum = layout_of(request.layout), checksum_of(request.checksum_algorithm)
        spec = self._converter.kv_spec(layout_value(layout))
        if request.element_type not in (kv_pb2.ELEMENT_TYPE_UNSPECIFIED, spec.element_type):
            native = kv_pb2.ElementType.Name(spec.element_type)
            raise invalid_field("element_type", f"{request.element_type}: this server sends {native} only")
        require_spec(spec, request.expected_spec, "expected_spec")
        kv = session.sequence.kv
        range_ = resolve_range(range_of(request.range), kv.shape, session.num_tokens)
        chunk_bytes = chunk_bytes_of(request.chunk_bytes, self._max_chunk_bytes, in_segment=segment is not None)
        plan = ChunkPlan(range_, kv.shape, chunk_bytes)
        if request.resume_from_chunk > plan.total_chunks:
            raise invalid_field(
                "resume_from_chunk", f"{request.resume_from_chunk}: the stream has {plan.total_chunks} chunks"
            )
        place = None if segment is None else SegmentPlacement(segment, kv.shape, range_, layout, checksum)
        token_ids = session.tokens[: range_.token_end] if request.include_token_ids else ()
        manifest = manifest_message(session, spec, plan, checksum, token_ids=token_ids)
        return KvReader(kv, plan, layout, checksum, PULL_FRAMES, place), manifest

    async def OpenPush(  # noqa: N802
        self, request: pb.OpenPushRequest, context: grpc.aio.ServicerContext
    ) -> pb.OpenPushResponse:
        """Checks the contract and makes room; finds an upload again by its request_id."""
        request_id = required_identifier("request_id", request.request_id)
        command = import_command(request.header, self._converter, current_caller().tenant, request_id, field="header")
        upload = self._uploads.open(command)
        done = self._uploads.settle(upload)
        return pb.OpenPushResponse(
            upload_id=upload.upload_id,
            missing_chunks=[pb.ChunkRun(start=start, end=end) for start, end in upload.writer.missing()],
            session=None if done is None else self._converter.session(done),
        )

    async def PushKv(  # noqa: N802
        self, request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> pb.PushKvResponse:
        """Header, then chunks, of a new upload or of one that OpenPush opened."""
        header = await read_header(request_iterator, dict(context.invocation_metadata()))
        upload = self._upload_of(header)
        started, failure, transport, stream = time.perf_counter(), "cancelled", "grpc", None
        try:
            with ExitStack() as stack:
                place = None
                if header.transfer_id:
                    tenant = current_caller().tenant
                    segment = stack.enter_context(self._segments.borrow(tenant, header.transfer_id))
                    transport = segment.transport
                    place = upload.writer.placed_in(segment)
                stream = PushStream(self._uploads, upload, place, self._executor)
                await stream.take(request_iterator)
            done = self._uploads.settle(upload)
            if done is None and not upload.command.request_id:
                raise invalid_field(
                    "header.manifest.total_chunks",
                    f"the stream ended after {stream.num_chunks} of {upload.command.total_chunks} chunks",
                )
            failure = ""
        except PrefillError as error:
            failure = str(error.reason).lower()
            raise
        finally:
            if not upload.command.request_id:
                self._uploads.drop(upload)
            sent_bytes = 0 if stream is None else stream.num_bytes
            self._events.emit(KvTransferred("push", transport, sent_bytes, time.perf_counter() - started, failure))
        return pb.PushKvResponse(
            session=None if done is None else self._converter.session(done), accepted_chunks=stream.num_chunks
        )

    def _upload_of(self, header: pb.PushKvHeader) -> Upload:
        tenant = current_caller().tenant
        if not header.upload_id:
            return self._uploads.open(import_command(header, self._converter, tenant, "", field="header"))
        if header.HasField("manifest") or header.token_ids or header.session_id:
            raise invalid_field("header.upload_id", "names an upload that has its header: leave the other fields out")
        return self._uploads.get(tenant, header.upload_id)
