"""Domain errors as gRPC statuses with google.rpc details (AIP-193)."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from sale_prefill_server.errors import PrefillError, Reason

DOMAIN = "sale-prefill"
#: gRPC clients obey it between retries (gRFC A6).
PUSHBACK_HEADER = "grpc-retry-pushback-ms"
DETAILS_HEADER = "grpc-status-details-bin"

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.NO_TOKENS: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_TOKEN: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONTEXT_EXCEEDED: grpc.StatusCode.OUT_OF_RANGE,
    Reason.INVALID_SAMPLING: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SESSION_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.SESSION_EXPIRED: grpc.StatusCode.NOT_FOUND,
    Reason.SESSION_BUSY: grpc.StatusCode.ABORTED,
    Reason.PREFIX_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.GENERATION_MISMATCH: grpc.StatusCode.ABORTED,
    Reason.REQUEST_ID_REUSED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.ATTENTION_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.KV_CAPACITY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.MESSAGE_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.ENGINE_FAILED: grpc.StatusCode.INTERNAL,
    Reason.CHECKSUM_MISMATCH: grpc.StatusCode.DATA_LOSS,
    Reason.KV_SPEC_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.TRANSFER_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.PIN_QUOTA: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}


def status_of(error: PrefillError) -> status_pb2.Status:
    """The rich status: ErrorInfo always; BadRequest, ResourceInfo and RetryInfo where they say something."""
    code = CODES[error.reason]
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if code is grpc.StatusCode.NOT_FOUND:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="session", resource_name=error.metadata.get("session_id", ""), description=error.message
            )
        )
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def trailing_metadata(error: PrefillError) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata that carries the details, and the pushback where there is one."""
    metadata: list[tuple[str, str | bytes]] = [(DETAILS_HEADER, status_of(error).SerializeToString())]
    if error.retry_after_seconds is not None:
        metadata.append((PUSHBACK_HEADER, str(int(error.retry_after_seconds * 1000))))
    return tuple(metadata)
