"""OpenTransfer and CloseTransfer: segments of memory beside gRPC, for callers on this host."""

from __future__ import annotations

import asyncio
import time

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from sale_prefill.v1 import kv_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.rpc.convert import Converter, required_identifier
from sale_prefill_server.rpc.interceptor import current_caller
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import SessionState, token_digest
from sale_prefill_server.transfer.chunks import KvRange, resolve_range
from sale_prefill_server.transfer.segment_memory import SegmentTransport
from sale_prefill_server.transfer.segments import SegmentBroker, SegmentTicket

_TRANSPORTS = {
    pb.TRANSPORT_SHM: SegmentTransport.SHM,
    pb.TRANSPORT_CUDA_IPC: SegmentTransport.CUDA_IPC,
}
_TRANSPORT_VALUES = {transport: value for value, transport in _TRANSPORTS.items()}


def transport_value(transport: SegmentTransport) -> pb.Transport:
    """The message's number of a transport."""
    return _TRANSPORT_VALUES[transport]


class TransferCalls:
    """Part of KvTransferService; what it needs is set by the servicer that has it among its bases."""

    _manager: SessionManager
    _converter: Converter
    _segments: SegmentBroker

    async def OpenTransfer(  # noqa: N802
        self, request: pb.OpenTransferRequest, context: grpc.aio.ServicerContext
    ) -> pb.OpenTransferResponse:
        """A segment of the first transport that both sides have. A caller that leaves meanwhile lets it expire."""
        tenant = current_caller().tenant
        chosen = self._choose(list(request.transports))
        manifest = self._manifest(tenant, request) if request.session_id else None
        size_bytes = request.size_bytes or (0 if manifest is None else manifest.total_bytes)
        if chosen == pb.TRANSPORT_GRPC:
            return pb.OpenTransferResponse(transport=chosen, manifest=manifest, size_bytes=size_bytes)
        if not size_bytes:
            raise invalid_field("size_bytes", "0: say how many bytes, or name a session")
        ticket = await asyncio.to_thread(self._segments.open, tenant, _TRANSPORTS[chosen], size_bytes)
        expire_time = Timestamp()
        expire_time.FromMilliseconds(int((time.time() + ticket.expires_in_seconds) * 1000))
        return pb.OpenTransferResponse(
            transfer_id=ticket.transfer_id,
            transport=chosen,
            manifest=manifest,
            server_descriptor=descriptor_message(ticket).SerializeToString(),
            expire_time=expire_time,
            size_bytes=ticket.size_bytes,
        )

    async def CloseTransfer(  # noqa: N802
        self, request: pb.CloseTransferRequest, context: grpc.aio.ServicerContext
    ) -> pb.CloseTransferResponse:
        """Ends a segment; its memory goes when the stream that uses it ends, device memory when the caller let go."""
        transfer_id = required_identifier("transfer_id", request.transfer_id)
        await asyncio.to_thread(self._segments.close, current_caller().tenant, transfer_id)
        return pb.CloseTransferResponse()

    def _choose(self, asked: list[pb.Transport]) -> pb.Transport:
        offered = {pb.TRANSPORT_GRPC, *(_TRANSPORT_VALUES[transport] for transport in self._segments.transports)}
        chosen = next((value for value in asked if value in offered), None)
        if chosen is None:
            names = ", ".join(pb.Transport.Name(value).removeprefix("TRANSPORT_") for value in sorted(offered))
            raise invalid_field("transports", f"this server offers {names}, and the request none of them")
        return chosen

    def _manifest(self, tenant: str, request: pb.OpenTransferRequest) -> kv_pb2.KvManifest:
        session = self._manager.get(tenant, required_identifier("session_id", request.session_id))
        if session.state is SessionState.BUSY:
            raise PrefillError(
                Reason.SESSION_BUSY,
                f"session {session.session_id!r} is busy and may grow: name size_bytes instead",
                metadata={"session_id": session.session_id},
            )
        asked, shape = request.range, session.sequence.kv.shape
        wanted = KvRange(asked.token_start, asked.token_end, asked.layer_start, asked.layer_end)
        found = resolve_range(wanted, shape, session.num_tokens)
        layer_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        return kv_pb2.KvManifest(
            spec=self._converter.kv_spec(kv_pb2.KV_LAYOUT_THD),
            range=kv_pb2.KvRange(
                token_start=found.token_start,
                token_end=found.token_end,
                layer_start=found.layer_start,
                layer_end=found.layer_end,
            ),
            total_bytes=found.num_layers * found.num_tokens * layer_bytes,
            generation=session.generation,
            token_digest=token_digest(session.tokens[: found.token_end]),
        )


def descriptor_message(ticket: SegmentTicket) -> pb.ShmDescriptor | pb.CudaIpcDescriptor:
    """How the caller gets at a segment."""
    connection = pb.ShmDescriptor(socket_path=ticket.socket_path, token=ticket.token)
    if ticket.ipc_handle is None:
        return connection
    handle, device_uuid = ticket.ipc_handle
    return pb.CudaIpcDescriptor(handle=handle, device_uuid=device_uuid, connection=connection)
