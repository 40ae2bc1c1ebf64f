"""Segments of memory shared with a server on this host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

from sale_prefill.v1 import kv_transfer_service_pb2, kv_transfer_service_pb2_grpc

from .. import _requests
from ..cuda_segments import CudaSegment, Segment
from ..errors import NotImplementedByServerError, OverloadedError, TransferUnknownError
from ..extras import MissingExtraError
from ..options import Range, SegmentTransport
from ..segments import SegmentFallbackWarning, SegmentUnreachableError, SharedSegment
from ._io import run_blocking
from .connection import AsyncConnection

_STUB = kv_transfer_service_pb2_grpc.KvTransferServiceStub
_KINDS: dict[int, Callable[[str, bytes, int], Segment]] = {
    kv_transfer_service_pb2.TRANSPORT_SHM: SharedSegment,
    kv_transfer_service_pb2.TRANSPORT_CUDA_IPC: CudaSegment,
}
#: Why one transport is not to be had, and another one, or messages, may be.
_NOT_TO_BE_HAD = (OverloadedError, NotImplementedByServerError, SegmentUnreachableError, MissingExtraError)


class AsyncTransferCalls(AsyncConnection):
    """KvTransferService.OpenTransfer and CloseTransfer."""

    _said_fallback = False

    async def open_transfer(
        self,
        *,
        session_id: str = "",
        token_range: Range | None = None,
        layer_range: Range | None = None,
        size_bytes: int = 0,
        transports: Sequence[SegmentTransport] = ("shm",),
        timeout_seconds: float | None = None,
    ) -> Segment | None:
        """Memory that KV may come and go through instead of through messages.

        Close it with `close_transfer`. It also goes when this process ends, or when no stream uses it for some minutes.

        Args:
            session_id: session whose KV, or part of it, is to fit; leave it out where `size_bytes` says the size.
            token_range, layer_range: the part.
            size_bytes: size.
            transports: `"shm"`, `"cuda_ipc"`, best first; the first that both sides can have is taken.
            timeout_seconds: for the call.

        Returns:
            The segment; None where server and client are not on one host, the server offers none of the transports, or
            it has no memory to spare: the first time that is said (SegmentFallbackWarning), and the bytes can go
            through messages as ever.

        Raises:
            SalePrefillError: another failure of the call.
        """
        request = _requests.open_transfer_request(
            session_id=session_id,
            token_range=token_range,
            layer_range=layer_range,
            size_bytes=size_bytes,
            transports=transports,
        )
        reason: object = f"the server offers none of {', '.join(transports)}"
        for transport in list(request.transports)[:-1]:
            request.transports[:] = [transport, kv_transfer_service_pb2.TRANSPORT_GRPC]
            try:
                segment = await self._opened(request, timeout_seconds)
            except _NOT_TO_BE_HAD as error:
                reason = error
                continue
            if segment is not None:
                return segment
        self._say_fallback(reason)
        return None

    async def _opened(
        self, request: kv_transfer_service_pb2.OpenTransferRequest, timeout_seconds: float | None
    ) -> Segment | None:
        """A segment of the request's first transport; None where the server has no such transport."""
        response = await self._call(
            _STUB, "OpenTransfer", request, timeout_seconds=timeout_seconds, session_id=request.session_id or None
        )
        kind = _KINDS.get(response.transport)
        if kind is None:
            return None
        try:
            return await run_blocking(kind, response.transfer_id, response.server_descriptor, response.size_bytes)
        except BaseException:
            await self._close_on_server(response.transfer_id, timeout_seconds)
            raise

    async def close_transfer(self, segment: Segment, *, timeout_seconds: float | None = None) -> None:
        """Give a segment back. Arrays of shared memory stay good, tensors in device memory do not."""
        await run_blocking(segment.close)
        await self._close_on_server(segment.transfer_id, timeout_seconds)

    async def _close_on_server(self, transfer_id: str, timeout_seconds: float | None) -> None:
        request = kv_transfer_service_pb2.CloseTransferRequest(transfer_id=transfer_id, completed=True)
        with suppress(TransferUnknownError):  # gone with its connection
            await self._call(_STUB, "CloseTransfer", request, timeout_seconds=timeout_seconds)

    def _say_fallback(self, reason: object) -> None:
        if not self._said_fallback:
            self._said_fallback = True
            warnings.warn(
                f"no memory is shared with the server at {self.target}, so KV goes through messages: {reason}",
                SegmentFallbackWarning,
                stacklevel=3,
            )
