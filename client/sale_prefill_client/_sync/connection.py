# Generated from _async/connection.py by tools/generate_sync_client.py. Do not edit.
"""One connection to a server: channel, credentials, timeouts, repeated attempts. The calls are built on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from .. import _channel
from .._retry import Attempts, Deadline
from ..errors import MessageTooLargeError, from_rpc_error
from ..options import DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TARGET, Keepalive, RetryPolicy, TlsOptions
from ._io import EventReader, open_channel, sleep
from .event_stream import EventStream

_MAX_HEADER_CHARACTERS = 256
_NEVER_REPEATED = RetryPolicy(max_attempts=1)


class Connection:
    """Base of the client; see `Client` for the arguments."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        token: str | None = None,
        tls: TlsOptions | None = None,
        default_timeout_seconds: float = 30.0,
        inactivity_timeout_seconds: float | None = 30.0,
        retry: RetryPolicy | None = None,
        keepalive: Keepalive | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.target = target
        self._token = token
        self._credentials = None if tls is None else _channel.channel_credentials(tls)
        self._default_timeout_seconds = default_timeout_seconds
        self._inactivity_timeout_seconds = inactivity_timeout_seconds
        self._retry = RetryPolicy() if retry is None else retry
        self._max_message_bytes = max_message_bytes
        self._options = _channel.channel_options(
            max_message_bytes=max_message_bytes,
            keepalive=Keepalive() if keepalive is None else keepalive,
            server_name=None if tls is None else tls.server_name,
        )
        self._opening = threading.Lock()
        self._channels: dict[int, Any] = {}
        self._closed = False
        if token is not None and tls is None:
            _channel.warn_of_insecure_token(target)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are still running end as cancelled. Sessions stay on the server."""
        with self._opening:
            self._closed, channels, self._channels = True, self._channels, {}
        for channel in channels.values():
            channel.close()

    def _open_channel(self, number: int = 0) -> Any:
        """A channel; each number has a TCP connection of its own."""
        with self._opening:
            if self._closed:
                raise RuntimeError(f"the client of {self.target} is closed; make a new one")
            if number not in self._channels:
                own = [("grpc.use_local_subchannel_pool", 1)] if number else []
                self._channels[number] = open_channel(self.target, self._credentials, [*self._options, *own])
            return self._channels[number]

    def _metadata(self, session_id: str | None) -> list[tuple[str, str]]:
        """The caller's token, and the session id for load balancers (where a header can hold it: whether it is a valid
        id is the server's to say, from the request)."""
        metadata = [] if self._token is None else [("authorization", f"Bearer {self._token}")]
        if (
            session_id
            and len(session_id) <= _MAX_HEADER_CHARACTERS
            and session_id.isascii()
            and session_id.isprintable()
        ):
            metadata.append(("x-session-id", session_id))
        return metadata

    def _check_size(self, request: Message) -> None:
        size_bytes = request.ByteSize()
        if size_bytes > self._max_message_bytes:
            raise MessageTooLargeError(
                f"the request is {size_bytes} bytes and this client's limit is {self._max_message_bytes}; send the "
                "tokens in several prefills, or raise max_message_bytes here and on the server",
                metadata={"size_bytes": str(size_bytes), "max_message_bytes": str(self._max_message_bytes)},
            )

    def _call(
        self,
        stub_class: Any,
        method: str,
        request: Message,
        *,
        timeout_seconds: float | None,
        session_id: str | None = None,
        repeatable: bool = False,
    ) -> Any:
        """The response of a unary call; `repeatable` where a second one does no harm."""
        self._check_size(request)
        deadline = Deadline(self._default_timeout_seconds if timeout_seconds is None else timeout_seconds)
        attempts = Attempts(self._retry if repeatable else _NEVER_REPEATED, deadline)
        call = getattr(stub_class(self._open_channel()), method)
        while True:
            try:
                return call(request, timeout=deadline.remaining_seconds(), metadata=self._metadata(session_id))
            except grpc.RpcError as error:
                wait_seconds = attempts.wait_seconds(from_rpc_error(error, deadline.timeout_seconds))
            sleep(wait_seconds)

    def _stream(
        self,
        stub_class: Any,
        method: str,
        next_request: Callable[[], tuple[Message, str | None]],
        *,
        timeout_seconds: float | None,
        channel_number: int = 0,
        holds: bool = False,
    ) -> EventStream:
        """A server stream that is repeated where the connection breaks.

        Args:
            stub_class: generated stub.
            method: its method.
            next_request: for each attempt, the request and the session id as far as it is known.
            timeout_seconds: for all attempts together; None for no limit.
            channel_number: connection to use.
            holds: see `Attempts`.
        """
        deadline = Deadline(timeout_seconds)

        def open_reader() -> EventReader:
            request, session_id = next_request()
            self._check_size(request)
            call = getattr(stub_class(self._open_channel(channel_number)), method)
            return EventReader(
                call(request, timeout=deadline.remaining_seconds(), metadata=self._metadata(session_id)),
                timeout_seconds=timeout_seconds,
                inactivity_timeout_seconds=self._inactivity_timeout_seconds,
            )

        return EventStream(open_reader, Attempts(self._retry, deadline, holds=holds))
