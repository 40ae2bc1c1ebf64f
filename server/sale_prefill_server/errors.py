"""Domain errors. Each names the thing, the value and the way out; `rpc/errors.py` gives them their gRPC codes."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from sale_prefill_server.kv.pool import KvCapacityError


class Reason(StrEnum):
    """Machine-readable cause: the names of `ErrorReason` in proto/sale_prefill/v1/error.proto, less the prefix."""

    NO_TOKENS = "NO_TOKENS"
    INVALID_TOKEN = "INVALID_TOKEN"
    CONTEXT_EXCEEDED = "CONTEXT_EXCEEDED"
    INVALID_SAMPLING = "INVALID_SAMPLING"
    INVALID_FIELD = "INVALID_FIELD"
    SESSION_UNKNOWN = "SESSION_UNKNOWN"
    SESSION_EXPIRED = "SESSION_EXPIRED"
    SESSION_BUSY = "SESSION_BUSY"
    PREFIX_MISMATCH = "PREFIX_MISMATCH"
    GENERATION_MISMATCH = "GENERATION_MISMATCH"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    ATTENTION_MISMATCH = "ATTENTION_MISMATCH"
    KV_CAPACITY = "KV_CAPACITY"
    QUEUE_FULL = "QUEUE_FULL"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    NOT_READY = "NOT_READY"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    CANCELLED = "CANCELLED"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    ENGINE_FAILED = "ENGINE_FAILED"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    KV_SPEC_MISMATCH = "KV_SPEC_MISMATCH"
    TRANSFER_UNKNOWN = "TRANSFER_UNKNOWN"
    PIN_QUOTA = "PIN_QUOTA"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"


class PrefillError(Exception):
    """A request that cannot be served.

    Args:
        reason: cause, for programs.
        message: for people; names the thing, the value and the way out.
        metadata: the values in `message`, for programs.
        field: name of the request field at fault, where one is.
        retry_after_seconds: when to come back, where that helps.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        field: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.field = field
        self.retry_after_seconds = retry_after_seconds


def invalid_field(field: str, message: str) -> PrefillError:
    """An `INVALID_FIELD` error; `message` says what is wrong with `field` and what would be right."""
    return PrefillError(Reason.INVALID_FIELD, f"{field}: {message}", field=field)


def kv_capacity(error: KvCapacityError) -> PrefillError:
    """A `KV_CAPACITY` error: the request does not fit the KV memory."""
    return PrefillError(
        Reason.KV_CAPACITY,
        f"the request needs {error.needed_bytes} bytes of KV more, {error.free_bytes} are free: delete sessions, or "
        "give the server more --kv-memory",
        metadata={"needed_bytes": error.needed_bytes, "free_bytes": error.free_bytes},
        retry_after_seconds=1.0,
    )
