"""Errors keep what the server said: code, reason, metadata, fields and when to come back."""

from __future__ import annotations

import threading

import grpc
import pytest
from google.rpc import error_details_pb2

from sale_prefill.v1 import error_pb2
from sale_prefill_client import errors
from tests.unit.client.scripted import (
    BOTH_CLIENTS,
    Calls,
    Handler,
    SyncCalls,
    error_info,
    retry_info,
    rich_status,
    scripted_server,
)

REASONS = [
    name.removeprefix("ERROR_REASON_")
    for name in error_pb2.ErrorReason.DESCRIPTOR.values_by_name
    if not name.endswith("UNSPECIFIED")
]


def failing_with(*details: object, code: grpc.StatusCode, message: str = "it failed") -> Handler:
    def handler(_: object, context: grpc.ServicerContext) -> None:
        context.abort_with_status(rich_status(code, message, *details))

    return handler


def error_of(handler: Handler, calls: Calls = SyncCalls) -> errors.SalePrefillError:
    with scripted_server(GetSession=handler) as target, pytest.raises(errors.SalePrefillError) as caught:
        calls(target).get_session("s-1", timeout_seconds=5)
    return caught.value


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_of_the_contract_has_a_class_of_its_own(reason: str) -> None:
    found = [
        cls for cls in vars(errors).values() if isinstance(cls, type) and getattr(cls, "default_reason", "") == reason
    ]
    assert len(found) == 1
    assert issubclass(found[0], errors.SalePrefillError)


@pytest.mark.parametrize("calls", BOTH_CLIENTS)
def test_details_arrive_whole(calls: Calls) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="token_ids[7]", description="too big")
    error = error_of(
        failing_with(
            error_info("INVALID_TOKEN", index="7", token_id="999"),
            error_details_pb2.BadRequest(field_violations=[violation]),
            retry_info(1.5),
            code=grpc.StatusCode.INVALID_ARGUMENT,
            message="token_ids[7] = 999",
        ),
        calls,
    )
    assert type(error) is errors.InvalidTokenError
    assert isinstance(error, ValueError)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")
    assert error.metadata == {"index": "7", "token_id": "999"}
    assert error.field_violations == (errors.FieldViolation("token_ids[7]", "too big"),)
    assert error.retry_after_seconds == 1.5
    assert str(error) == "token_ids[7] = 999 [INVALID_ARGUMENT INVALID_TOKEN]"


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN", errors.SessionUnknownError),
        (grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED", errors.SessionExpiredError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", errors.QueueFullError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_CAPACITY", errors.KvCapacityError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE", errors.MessageTooLargeError),
        (grpc.StatusCode.FAILED_PRECONDITION, "SOME_NEW_REASON", errors.ConflictError),
        (grpc.StatusCode.PERMISSION_DENIED, "SOME_NEW_REASON", errors.SalePrefillError),
    ],
)
def test_one_code_with_several_causes_gives_several_classes(
    code: grpc.StatusCode, reason: str, expected: type[errors.SalePrefillError]
) -> None:
    error = error_of(failing_with(error_info(reason), code=code))
    assert type(error) is expected
    assert error.reason == reason


def test_a_reason_of_another_domain_is_not_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="SESSION_UNKNOWN", domain="proxy.example")
    error = error_of(failing_with(info, code=grpc.StatusCode.NOT_FOUND))
    assert type(error) is errors.SessionNotFoundError
    assert error.reason == ""


def test_a_mangled_trailer_does_not_hide_the_error() -> None:
    def handler(_: object, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xffnonsense"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    error = error_of(handler)
    assert type(error) is errors.SessionNotFoundError
    assert error.message == "gone"


@pytest.mark.parametrize("calls", BOTH_CLIENTS)
def test_a_missed_timeout_names_it(calls: Calls) -> None:
    def handler(_: object, context: grpc.ServicerContext) -> None:
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(5)
        context.abort(grpc.StatusCode.CANCELLED, "")

    with (
        scripted_server(GetSession=handler) as target,
        pytest.raises(errors.DeadlineExceededError, match=r"0\.2 seconds"),
    ):
        calls(target).get_session("s-1", timeout_seconds=0.2)


def test_a_message_that_grpc_itself_refuses_is_too_large_and_no_overload() -> None:
    with scripted_server() as target, pytest.raises(errors.MessageTooLargeError) as caught:
        SyncCalls(target).prefill([300_000_000] * (300 << 10))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("calls", BOTH_CLIENTS)
def test_the_client_refuses_a_message_over_its_own_limit_and_says_both_numbers(calls: Calls) -> None:
    with pytest.raises(
        errors.MessageTooLargeError, match=r"request is \d{5} bytes and this client's limit is 4096"
    ) as caught:
        calls("127.0.0.1:1", max_message_bytes=4096).prefill([300] * 10_000)
    assert caught.value.metadata["max_message_bytes"] == "4096"
    assert int(caught.value.metadata["size_bytes"]) > 20_000
