"""KvTransferService: PullKv; the rest of the contract is not in this release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2_grpc
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.events import EventBus, KvTransferred
from sale_prefill_server.rpc.convert import Converter, required_identifier
from sale_prefill_server.rpc.interceptor import current_caller
from sale_prefill_server.rpc.transfer_calls import TransferCalls
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Session, SessionState, token_digest
from sale_prefill_server.transfer.kv_stream import (
    DEFAULT_CHUNK_BYTES,
    MINIMUM_CHUNK_BYTES,
    Checksum,
    KvRange,
    KvStream,
    Layout,
    resolve_range,
)
from sale_prefill_server.transfer.segments import SegmentBroker

_LAYOUTS = {
    kv_pb2.KV_LAYOUT_UNSPECIFIED: Layout.THD,
    kv_pb2.KV_LAYOUT_THD: Layout.THD,
    kv_pb2.KV_LAYOUT_HTD: Layout.HTD,
}
_LAYOUT_VALUES = {Layout.THD: kv_pb2.KV_LAYOUT_THD, Layout.HTD: kv_pb2.KV_LAYOUT_HTD}
_CHECKSUMS = {
    kv_pb2.CHECKSUM_ALGORITHM_UNSPECIFIED: Checksum.CRC32C,
    kv_pb2.CHECKSUM_ALGORITHM_CRC32C: Checksum.CRC32C,
    kv_pb2.CHECKSUM_ALGORITHM_XXH3_64: Checksum.XXH3_64,
    kv_pb2.CHECKSUM_ALGORITHM_NONE: Checksum.NONE,
}
_CHECKSUM_VALUES = {
    Checksum.NONE: kv_pb2.CHECKSUM_ALGORITHM_NONE,
    Checksum.CRC32C: kv_pb2.CHECKSUM_ALGORITHM_CRC32C,
    Checksum.XXH3_64: kv_pb2.CHECKSUM_ALGORITHM_XXH3_64,
}
_KINDS = (kv_pb2.KV_KIND_KEY, kv_pb2.KV_KIND_VALUE)


class KvTransferServicer(TransferCalls, kv_transfer_service_pb2_grpc.KvTransferServiceServicer):
    """Serves KV bytes in gRPC messages."""

    def __init__(
        self,
        manager: SessionManager,
        converter: Converter,
        events: EventBus,
        segments: SegmentBroker,
        max_message_bytes: int,
    ) -> None:
        self._manager = manager
        self._converter = converter
        self._segments = segments
        self._events = events
        self._max_chunk_bytes = max_message_bytes // 2

    async def PullKv(  # noqa: N802
        self, request: pb.PullKvRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PullKvResponse]:
        """Manifest, then chunks. The stream reads one generation; later appends do not disturb it."""
        session = self._readable_session(request)
        kv = session.sequence.kv.acquire()
        started, sent_bytes, failure = time.perf_counter(), 0, "cancelled"
        try:
            manifest, stream = self._open(request, session)
            yield pb.PullKvResponse(manifest=manifest)
            for index in range(request.resume_from_chunk, stream.total_chunks):
                planned = stream.plan(index)
                data, checksum = await asyncio.to_thread(stream.read, planned)
                chunk = kv_pb2.KvChunk(
                    index=index,
                    layer=planned.layer,
                    kind=_KINDS[planned.kind],
                    token_start=planned.token_start,
                    num_tokens=planned.num_tokens,
                    checksum=checksum,
                    data=data,
                )
                yield pb.PullKvResponse(chunk=chunk)
                sent_bytes += len(data)
            failure = ""
        except PrefillError as error:
            failure = str(error.reason).lower()
            raise
        finally:
            kv.release()
            self._events.emit(KvTransferred("pull", "grpc", sent_bytes, time.perf_counter() - started, failure))

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

    def _open(self, request: pb.PullKvRequest, session: Session) -> tuple[kv_pb2.KvManifest, KvStream]:
        spec = self._converter.kv_spec()
        if request.element_type not in (kv_pb2.ELEMENT_TYPE_UNSPECIFIED, spec.element_type):
            native = kv_pb2.ElementType.Name(spec.element_type)
            raise invalid_field("element_type", f"{request.element_type}: this server sends {native} only")
        if request.layout not in _LAYOUTS:
            raise invalid_field("layout", f"{request.layout} is no KvLayout; ask for THD or HTD")
        if request.checksum_algorithm not in _CHECKSUMS:
            raise invalid_field("checksum_algorithm", f"{request.checksum_algorithm} is none that this server knows")
        chunk_bytes = request.chunk_bytes or min(DEFAULT_CHUNK_BYTES, self._max_chunk_bytes)
        if not MINIMUM_CHUNK_BYTES <= chunk_bytes <= self._max_chunk_bytes:
            raise invalid_field(
                "chunk_bytes", f"{chunk_bytes}: must be {MINIMUM_CHUNK_BYTES} to {self._max_chunk_bytes}"
            )
        asked = request.range
        wanted = KvRange(asked.token_start, asked.token_end, asked.layer_start, asked.layer_end)
        range_ = resolve_range(wanted, session.sequence.kv.shape, session.num_tokens)
        layout, checksum = _LAYOUTS[request.layout], _CHECKSUMS[request.checksum_algorithm]
        stream = KvStream(session.sequence.kv, range_, layout, checksum, chunk_bytes)
        if request.resume_from_chunk > stream.total_chunks:
            raise invalid_field(
                "resume_from_chunk", f"{request.resume_from_chunk}: the stream has {stream.total_chunks} chunks"
            )
        manifest = kv_pb2.KvManifest(
            spec=self._converter.kv_spec(_LAYOUT_VALUES[layout]),
            range=kv_pb2.KvRange(
                token_start=range_.token_start,
                token_end=range_.token_end,
                layer_start=range_.layer_start,
                layer_end=range_.layer_end,
            ),
            total_bytes=stream.total_bytes,
            total_chunks=stream.total_chunks,
            checksum_algorithm=_CHECKSUM_VALUES[checksum],
            generation=session.generation,
            token_digest=token_digest(session.tokens[: range_.token_end]),
        )
        return manifest, stream

    async def PushKv(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PushKvRequest], context: grpc.aio.ServicerContext
    ) -> pb.PushKvResponse:
        """Not in this release."""
        raise PrefillError(Reason.NOT_IMPLEMENTED, "PushKv is not in this release: prefill the tokens here")
