# Generated from _async/client.py by tools/generate_sync_client.py. Do not edit.
"""The client: every call in one object."""

from __future__ import annotations

from .decode import DecodeCalls
from .prefill import PrefillCalls
from .pull import PullCalls
from .push import PushCalls
from .transfers import TransferCalls


class Client(PrefillCalls, DecodeCalls, PullCalls, PushCalls, TransferCalls):
    """A connection to a sale-prefill server. Use it as a context manager, or call `close`.

    It connects with the first call. Calls that are safe to repeat are repeated when the server is unavailable; see
    `RetryPolicy`. Errors are subclasses of `errors.SalePrefillError`.

    Args:
        target: gRPC target, such as `127.0.0.1:50051`, `dns:///host:port` or `unix:/path`.
        token: bearer token, sent as `authorization` with each call.
        tls: transport security; None for none.
        default_timeout_seconds: timeout of unary calls that name none.
        inactivity_timeout_seconds: longest silence on a stream; servers send an event a second. None for no limit.
        retry: how calls are repeated; None for the defaults of `RetryPolicy`.
        keepalive: how dead connections are found; None for the defaults of `Keepalive`.
        max_message_bytes: limit of messages either way; the server has its own.

    Raises:
        OSError: a PEM file of `tls` cannot be read.
    """
