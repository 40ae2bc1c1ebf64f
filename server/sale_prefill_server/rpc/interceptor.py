"""What every call goes through: authentication, the gate, size, error mapping, accounting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.events import EventBus, RpcHandled, RpcStarted
from sale_prefill_server.rpc.auth import Authenticator, Caller
from sale_prefill_server.rpc.errors import CODES, trailing_metadata

logger = logging.getLogger(__name__)

_caller: ContextVar[Caller] = ContextVar("caller")
#: Methods whose servicers read requests themselves, from their bytes.
_BYTES_IN = ("/sale_prefill.v1.KvTransferService/PushKv",)
_OPEN_SERVICES = ("grpc.health.", "grpc.reflection.")


def current_caller() -> Caller:
    """The caller of the running RPC."""
    return _caller.get()


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio is not typed
    """Wraps each method of the project's own services; health and reflection pass.

    Args:
        authenticator: names the caller.
        events: told of each call.
        gate: raises where no call may enter now (the model is loading, the server is stopping).
        max_message_bytes: largest request; gRPC's own limit lies above it, so that a caller gets details.
    """

    def __init__(
        self, authenticator: Authenticator, events: EventBus, gate: Callable[[str], None], max_message_bytes: int
    ) -> None:
        self._authenticator = authenticator
        self._events = events
        self._gate = gate
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Replaces the method's handler with a wrapped one."""
        handler = await continuation(details)
        if handler is None or details.method.lstrip("/").startswith(_OPEN_SERVICES):
            return handler
        call = _Call(self, details)
        reads_bytes = details.method in _BYTES_IN
        arguments = (
            None if reads_bytes else handler.request_deserializer,
            _ready_or(handler.response_serializer),
        )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(call.unary(handler.stream_unary, "client_stream"), *arguments)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(call.stream(handler.unary_stream), *arguments)
        return grpc.unary_unary_rpc_method_handler(call.unary(handler.unary_unary, "unary"), *arguments)

    def enter(self, method: str, metadata: dict[str, str], request: Any) -> None:
        """Lets a call in, or raises."""
        _caller.set(self._authenticator.authenticate(metadata))
        self._gate(method)
        size_bytes = request.ByteSize() if hasattr(request, "ByteSize") else 0
        if size_bytes > self._max_message_bytes:
            raise PrefillError(
                Reason.MESSAGE_TOO_LARGE,
                f"the request has {size_bytes} bytes, the limit is {self._max_message_bytes}: send fewer tokens",
                metadata={"size_bytes": size_bytes, "max_message_bytes": self._max_message_bytes},
            )

    def emit(self, event: RpcStarted | RpcHandled) -> None:
        """Passes an event on."""
        self._events.emit(event)


def _ready_or(serializer: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Messages that a servicer has written out itself, as it does with KV, go as they are."""
    return lambda response: response if isinstance(response, bytes) else serializer(response)


class _Call:
    """One call's way through the interceptor."""

    def __init__(self, owner: CallInterceptor, details: grpc.HandlerCallDetails) -> None:
        self._owner = owner
        self._service, _, self._method = details.method.lstrip("/").partition("/")
        self._metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}

    def unary(self, behaviour: Callable[[Any, Any], Awaitable[Any]], kind: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def run(request: Any, context: grpc.aio.ServicerContext) -> Any:
            code, started = grpc.StatusCode.OK, self._start(kind)
            try:
                self._owner.enter(self._method, self._metadata, request)
                return await behaviour(request, context)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                failure = self._as_failure(error)
                code = CODES[failure.reason]
                await context.abort(code, failure.message, trailing_metadata(failure))
            finally:
                self._end(kind, code, started)

        return run

    def stream(self, behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def run(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            code, started = grpc.StatusCode.OK, self._start("server_stream")
            responses: Any = None
            try:
                self._owner.enter(self._method, self._metadata, request)
                responses = behaviour(request, context)
                async for response in responses:
                    yield response
            except (asyncio.CancelledError, GeneratorExit):
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                failure = self._as_failure(error)
                code = CODES[failure.reason]
                await context.abort(code, failure.message, trailing_metadata(failure))
            finally:
                if responses is not None:
                    await responses.aclose()  # now, not when the collector comes by: it lets go of the job
                self._end("server_stream", code, started)

        return run

    def _start(self, kind: str) -> float:
        self._owner.emit(RpcStarted(self._service, self._method, kind))
        return time.perf_counter()

    def _end(self, kind: str, code: grpc.StatusCode, started: float) -> None:
        self._owner.emit(RpcHandled(self._service, self._method, kind, code.name, time.perf_counter() - started))

    def _as_failure(self, error: Exception) -> PrefillError:
        if isinstance(error, PrefillError):
            return error
        logger.error("%s/%s failed", self._service, self._method, exc_info=error)
        return PrefillError(
            Reason.ENGINE_FAILED, f"internal fault ({type(error).__name__}) in {self._method}; the server's log has it"
        )
