"""What a channel needs to know, the same for the sync and the asyncio client."""

from __future__ import annotations

import ipaddress
import re
import warnings
from pathlib import Path
from urllib.parse import unquote

import grpc

from .options import Keepalive, TlsOptions


class InsecureTokenWarning(UserWarning):
    """A bearer token travels unencrypted to another host."""


def _pem(source: bytes | str | Path | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()


def channel_credentials(tls: TlsOptions) -> grpc.ChannelCredentials:
    """gRPC's credentials; OSError where a file cannot be read."""
    return grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.root_certificates),
        private_key=_pem(tls.client_key),
        certificate_chain=_pem(tls.client_certificate),
    )


def channel_options(
    *, max_message_bytes: int, keepalive: Keepalive, server_name: str | None
) -> list[tuple[str, int | str]]:
    """Channel arguments. A lost connection is tried again at once and then at most every 5 seconds, so that the waits
    of `RetryPolicy` decide and not gRPC's own, which grow to two minutes."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", int(keepalive.interval_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive.timeout_seconds * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def is_local_target(target: str) -> bool:
    """Whether bytes sent to this gRPC target stay on this machine: a loopback address or a Unix socket."""
    if re.match(r"unix(-abstract)?:", target):
        return True
    endpoint = unquote(re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?", "", target))
    bracketed = re.fullmatch(r"\[([^\]]*)\](:\d+)?", endpoint)
    host = bracketed[1] if bracketed else re.sub(r":\d+$", "", endpoint) if endpoint.count(":") == 1 else endpoint
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def warn_of_insecure_token(target: str) -> None:
    """Warn where a token would cross the network in the clear."""
    if not is_local_target(target):
        warnings.warn(
            f"the token is sent to {target} without encryption, where anyone on the way can read it; "
            "pass tls=TlsOptions(...)",
            InsecureTokenWarning,
            stacklevel=3,
        )
