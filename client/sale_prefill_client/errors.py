"""Errors of the client, decoded from `google.rpc.Status` in the trailer `grpc-status-details-bin`.

Branch on the class or on `reason`, not on the text. The reasons are those of `ErrorReason` in
`proto/sale_prefill/v1/error.proto`; errors found on this side before a call use the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

ERROR_DOMAIN = "sale-prefill"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A request field that was refused, and why (google.rpc.BadRequest)."""

    field: str
    description: str


class SalePrefillError(Exception):
    """A call that failed; the base of every error below.

    Args:
        message: for people.
        code: gRPC status code.
        reason: machine-readable cause, empty where the server named none.
        metadata: the values that the message speaks of, as text.
        field_violations: request fields that were refused.
        retry_after_seconds: when the server says to come back, where it says so.
    """

    default_code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    default_reason: str = ""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = self.default_reason if reason is None else reason
        self.metadata = dict(metadata or {})
        self.field_violations = field_violations
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        label = f"{self.code.name} {self.reason}".rstrip()
        return f"{self.message} [{label}]"


class InvalidRequestError(SalePrefillError, ValueError):
    """The request is wrong as it stands; repeating it cannot help."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class NoTokensError(InvalidRequestError):
    """No token ids where some are needed."""

    default_reason = "NO_TOKENS"


class InvalidTokenError(InvalidRequestError):
    """A token id outside the vocabulary; metadata: index, token_id, vocabulary_size."""

    default_reason = "INVALID_TOKEN"


class ContextExceededError(InvalidRequestError):
    """More tokens than the model's context; metadata: total_tokens, max_sequence_tokens."""

    default_code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "CONTEXT_EXCEEDED"


class InvalidSamplingError(InvalidRequestError):
    """A sampling option out of its range."""

    default_reason = "INVALID_SAMPLING"


class InvalidFieldError(InvalidRequestError):
    """Any other field out of its range; `field_violations` names it."""

    default_reason = "INVALID_FIELD"


class RequestIdReusedError(InvalidRequestError):
    """The request id came back with a different request."""

    default_reason = "REQUEST_ID_REUSED"


class MessageTooLargeError(InvalidRequestError):
    """A message over the limit of this client, of the server, or of gRPC itself; metadata: size_bytes,
    max_message_bytes where they are known."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "MESSAGE_TOO_LARGE"


class SessionNotFoundError(SalePrefillError):
    """The server holds no such session."""

    default_code = grpc.StatusCode.NOT_FOUND


class SessionUnknownError(SessionNotFoundError):
    """No session of that id was ever seen, or it was deleted."""

    default_reason = "SESSION_UNKNOWN"


class SessionExpiredError(SessionNotFoundError):
    """The session's lease ended and its KV was freed: prefill again."""

    default_reason = "SESSION_EXPIRED"


class TransferUnknownError(SalePrefillError):
    """No transfer or upload of that id: closed, expired, or another caller's. Open one again."""

    default_code = grpc.StatusCode.NOT_FOUND
    default_reason = "TRANSFER_UNKNOWN"


class ConflictError(SalePrefillError):
    """The session is not in the state that the request needs."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class SessionBusyError(ConflictError):
    """Another request is changing the session; retry when it is done."""

    default_code = grpc.StatusCode.ABORTED
    default_reason = "SESSION_BUSY"


class PrefixMismatchError(ConflictError):
    """The session does not hold the expected prefix; metadata: num_tokens, expected_prefix_tokens."""

    default_reason = "PREFIX_MISMATCH"


class GenerationMismatchError(ConflictError):
    """The session changed since the generation that the call named; metadata: generation."""

    default_code = grpc.StatusCode.ABORTED
    default_reason = "GENERATION_MISMATCH"


class AttentionMismatchError(ConflictError):
    """Attention settings differ from those that the session was created with."""

    default_reason = "ATTENTION_MISMATCH"


class KvSpecMismatchError(ConflictError):
    """Two KV formats differ; metadata: the field and both values."""

    default_reason = "KV_SPEC_MISMATCH"


class OverloadedError(SalePrefillError):
    """The server has no room now; `retry_after_seconds` may say when to come back."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class KvCapacityError(OverloadedError):
    """The KV would not fit the server's budget; metadata: needed_bytes, free_bytes."""

    default_reason = "KV_CAPACITY"


class PinQuotaError(OverloadedError):
    """The tenant's hard pins would exceed its quota; metadata: needed_bytes, quota_bytes."""

    default_reason = "PIN_QUOTA"


class QueueFullError(OverloadedError):
    """Too many requests or tokens wait."""

    default_reason = "QUEUE_FULL"


class UnavailableError(SalePrefillError):
    """The server cannot be reached, or not yet, or no more."""

    default_code = grpc.StatusCode.UNAVAILABLE


class StoreUnavailableError(UnavailableError):
    """The durability asked for cannot be promised now: its tier is slow, full or down."""

    default_reason = "STORE_UNAVAILABLE"


class NotReadyError(UnavailableError):
    """The model is loading or kernels are being built."""

    default_reason = "NOT_READY"


class ShuttingDownError(UnavailableError):
    """The server is stopping."""

    default_reason = "SHUTTING_DOWN"


class UnauthenticatedError(SalePrefillError):
    """No credential, or a wrong one."""

    default_code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class RequestCancelledError(SalePrefillError):
    """A caller or a forced delete stopped the request."""

    default_code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class DeadlineExceededError(SalePrefillError):
    """The call took longer than its timeout."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class InactivityTimeoutError(DeadlineExceededError):
    """A stream was silent for longer than the client's `inactivity_timeout_seconds`; healthy servers send an event a
    second."""

    default_reason = "INACTIVITY_TIMEOUT"


class NotImplementedByServerError(SalePrefillError):
    """In the contract, but not in this server."""

    default_code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "NOT_IMPLEMENTED"


class EngineFailedError(SalePrefillError):
    """The engine failed; the session was put back to what it was."""

    default_code = grpc.StatusCode.INTERNAL
    default_reason = "ENGINE_FAILED"


class ChecksumMismatchError(SalePrefillError):
    """Bytes differ from their checksum; metadata: chunk_index (KV) or file (tokenizer)."""

    default_code = grpc.StatusCode.DATA_LOSS
    default_reason = "CHECKSUM_MISMATCH"


class NoTokenizerError(SalePrefillError):
    """The served model has no fast tokenizer: send token ids instead of text."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "NO_TOKENIZER"


class ProtocolError(SalePrefillError):
    """The server broke the contract: a stream without its last event, a gap or a repeat in KV bytes, other tokens on a
    retry."""

    default_code = grpc.StatusCode.INTERNAL
    default_reason = "PROTOCOL"


def _reason_classes() -> dict[str, type[SalePrefillError]]:
    found: dict[str, type[SalePrefillError]] = {}
    pending: list[type[SalePrefillError]] = [SalePrefillError]
    while pending:
        error_class = pending.pop()
        if error_class.default_reason:
            found[error_class.default_reason] = error_class
        pending += error_class.__subclasses__()
    return found


_CLASS_BY_REASON = _reason_classes()
_CLASS_BY_CODE: dict[grpc.StatusCode, type[SalePrefillError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: SessionNotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: ConflictError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServerError,
}


def _status_of(call: grpc.RpcError) -> status_pb2.Status | None:
    """The rich status of a failed call; None where there is none or a proxy has mangled it."""
    try:
        return rpc_status.from_call(call)
    except (ValueError, DecodeError):  # a broken trailer must not hide the error that it came with
        return None


def _details(status: status_pb2.Status | None) -> tuple[str, dict[str, str], list[FieldViolation], float | None]:
    reason, metadata, violations, retry_after_seconds = "", {}, [], None
    for detail in [] if status is None else status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            if info.domain == ERROR_DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [FieldViolation(entry.field, entry.description) for entry in bad_request.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after_seconds = delay.seconds + delay.nanos / 1e9
    return reason, metadata, violations, retry_after_seconds


def from_rpc_error(error: grpc.RpcError, timeout_seconds: float | None = None) -> SalePrefillError:
    """The typed error of a failed gRPC call, sync or asyncio.

    Args:
        error: what gRPC raised.
        timeout_seconds: timeout of the call, to name it where it was missed.

    The class follows the reason, or the code where the server named no reason that this client knows. gRPC core's own
    refusal of a large message shares RESOURCE_EXHAUSTED with overload and is told apart by its text.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    reason, metadata, violations, retry_after_seconds = _details(_status_of(error))
    error_class = _CLASS_BY_REASON.get(reason, _CLASS_BY_CODE.get(code, SalePrefillError))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not reason and "larger than max" in message:
        error_class = MessageTooLargeError
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not reason and timeout_seconds is not None:
        message = f"the call was not done within its timeout of {timeout_seconds:g} seconds"
    return error_class(
        message,
        code=code,
        reason=reason or error_class.default_reason,
        metadata=metadata,
        field_violations=tuple(violations),
        retry_after_seconds=retry_after_seconds,
    )
