"""A real gRPC server that does what a test says: breaks connections, keeps silent, sends wrong bytes.

It injects faults that the product's own server does not commit; what the product does is tested in tests/integration.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from sale_prefill.v1 import (
    kv_transfer_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    server_service_pb2_grpc,
    session_service_pb2_grpc,
)
from sale_prefill_client import AsyncClient, Client, DecodedToken, KvCache, PrefillResult, RetryPolicy, Session

FAST_RETRY = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01, max_backoff_seconds=0.02)

_SERVICERS = (
    (prefill_service_pb2_grpc.PrefillServiceServicer, prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server),
    (session_service_pb2_grpc.SessionServiceServicer, session_service_pb2_grpc.add_SessionServiceServicer_to_server),
    (
        kv_transfer_service_pb2_grpc.KvTransferServiceServicer,
        kv_transfer_service_pb2_grpc.add_KvTransferServiceServicer_to_server,
    ),
    (server_service_pb2_grpc.ServerServiceServicer, server_service_pb2_grpc.add_ServerServiceServicer_to_server),
)

Handler = Callable[[Any, grpc.ServicerContext], Any]


@contextmanager
def scripted_server(
    *,
    credentials: grpc.ServerCredentials | None = None,
    add: Callable[[grpc.Server], None] | None = None,
    **rpcs: Handler,
) -> Iterator[str]:
    """A server whose RPCs are the functions given by name; yields its target."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 1 << 20)])
    for servicer, register in _SERVICERS:
        scripted = {name: staticmethod(handler) for name, handler in rpcs.items() if hasattr(servicer, name)}
        cast(Any, register)(type(servicer.__name__, (servicer,), scripted)(), server)
    if add is not None:
        add(server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def rich_status(code: grpc.StatusCode, message: str, *details: Any) -> Any:
    """A status with google.rpc details, as a server sends it."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    assert code_pb2.Code.Name(status.code) == code.name
    return rpc_status.to_status(status)


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    """The project's ErrorInfo."""
    return error_details_pb2.ErrorInfo(reason=reason, domain="sale-prefill", metadata=metadata)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    """When to come back."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(int(seconds * 1000))
    return info


def break_connection(context: grpc.ServicerContext) -> None:
    """End the call as a lost connection does."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")


@dataclass
class Script:
    """One function an attempt: the first call runs the first one, and so on; the last one serves all further calls.

    Records requests, metadata, when calls came, and whether the caller cancelled them.
    """

    attempts: list[Handler]
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.times.append(time.monotonic())
        context.add_callback(self.ended.set)
        return self.attempts[min(len(self.requests), len(self.attempts)) - 1](request, context)


def prefill_events(*events: Any) -> list[prefill_service_pb2.PrefillResponse]:
    """Responses out of their parts: a number of computed tokens is a progress event."""
    responses = []
    for event in events:
        if isinstance(event, int):
            event = prefill_service_pb2.PrefillProgress(computed_tokens=event, total_tokens=8)
        kind = type(event).__name__.removeprefix("Prefill").lower()
        responses.append(prefill_service_pb2.PrefillResponse(**{kind: event}))
    return responses


ACCEPTED = prefill_service_pb2.PrefillAccepted(session_id="s-1", total_tokens=8)
JOINED = prefill_service_pb2.PrefillAccepted(session_id="s-1", total_tokens=8, joined=True)
RESULT = prefill_service_pb2.PrefillResult(
    session={"session_id": "s-1", "num_tokens": 8, "state": "SESSION_STATE_READY"}
)


def decode_tokens(*token_ids: int) -> prefill_service_pb2.DecodeResponse:
    """A response with new tokens."""
    tokens = [prefill_service_pb2.DecodedToken(token_id=token_id) for token_id in token_ids]
    return prefill_service_pb2.DecodeResponse(tokens={"tokens": tokens})


DECODE_ACCEPTED = prefill_service_pb2.DecodeResponse(accepted=ACCEPTED)
DECODE_RESULT = prefill_service_pb2.DecodeResponse(
    result={"session": {"session_id": "s-1"}, "finish_reason": "FINISH_REASON_LENGTH", "stats": {"decoded_tokens": 3}}
)


class SyncCalls:
    """Calls through `Client`, one client a call."""

    def __init__(self, target: str, **options: Any) -> None:
        self._target, self._options = target, {"retry": FAST_RETRY, **options}

    def prefill(self, *args: Any, **kwargs: Any) -> PrefillResult:
        with Client(self._target, **self._options) as client:
            return client.prefill(*args, **kwargs)

    def decode(self, *args: Any, stop_after: int | None = None, **kwargs: Any) -> tuple[list[DecodedToken], Any]:
        """Tokens and result; `stop_after` so many tokens the stream is cancelled."""
        tokens = []
        with Client(self._target, **self._options) as client, client.decode(*args, **kwargs) as stream:
            for token in stream:
                tokens.append(token)
                if len(tokens) == stop_after:
                    stream.cancel()
            return tokens, stream.result

    def pull_kv(self, *args: Any, **kwargs: Any) -> KvCache:
        with Client(self._target, **self._options) as client:
            return client.pull_kv(*args, **kwargs)

    def get_session(self, *args: Any, **kwargs: Any) -> Session:
        with Client(self._target, **self._options) as client:
            return client.get_session(*args, **kwargs)

    def fork_session(self, *args: Any, **kwargs: Any) -> Session:
        with Client(self._target, **self._options) as client:
            return client.fork_session(*args, **kwargs)

    def delete_session(self, *args: Any, **kwargs: Any) -> int:
        with Client(self._target, **self._options) as client:
            return client.delete_session(*args, **kwargs)

    def list_sessions(self, **kwargs: Any) -> list[Session]:
        with Client(self._target, **self._options) as client:
            return list(client.list_sessions(**kwargs))

    def wait_until_ready(self, *args: Any) -> None:
        with Client(self._target, **self._options) as client:
            client.wait_until_ready(*args)


class AsyncCalls:
    """The same calls through `AsyncClient`, one client and one event loop a call."""

    def __init__(self, target: str, **options: Any) -> None:
        self._target, self._options = target, {"retry": FAST_RETRY, **options}

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(self._target, **self._options) as client:
                return await getattr(client, name)(*args, **kwargs)

        return asyncio.run(run())

    def prefill(self, *args: Any, **kwargs: Any) -> PrefillResult:
        return cast(PrefillResult, self._run("prefill", *args, **kwargs))

    def decode(self, *args: Any, stop_after: int | None = None, **kwargs: Any) -> tuple[list[DecodedToken], Any]:
        """Tokens and result; `stop_after` so many tokens the stream is cancelled."""

        async def run() -> tuple[list[DecodedToken], Any]:
            tokens = []
            async with AsyncClient(self._target, **self._options) as client:
                async with client.decode(*args, **kwargs) as stream:
                    async for token in stream:
                        tokens.append(token)
                        if len(tokens) == stop_after:
                            stream.cancel()
                return tokens, stream.result

        return asyncio.run(run())

    def pull_kv(self, *args: Any, **kwargs: Any) -> KvCache:
        return cast(KvCache, self._run("pull_kv", *args, **kwargs))

    def get_session(self, *args: Any, **kwargs: Any) -> Session:
        return cast(Session, self._run("get_session", *args, **kwargs))

    def fork_session(self, *args: Any, **kwargs: Any) -> Session:
        return cast(Session, self._run("fork_session", *args, **kwargs))

    def delete_session(self, *args: Any, **kwargs: Any) -> int:
        return cast(int, self._run("delete_session", *args, **kwargs))

    def list_sessions(self, **kwargs: Any) -> list[Session]:
        async def run() -> list[Session]:
            async with AsyncClient(self._target, **self._options) as client:
                return [session async for session in client.list_sessions(**kwargs)]

        return asyncio.run(run())

    def wait_until_ready(self, *args: Any) -> None:
        self._run("wait_until_ready", *args)


Calls = type[SyncCalls] | type[AsyncCalls]
BOTH_CLIENTS = [SyncCalls, AsyncCalls]
