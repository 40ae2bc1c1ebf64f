"""A KV pull goes on after a broken connection, and stops at the first wrong byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client import errors
from tests.unit.client.scripted import (
    BOTH_CLIENTS,
    FAST_RETRY,
    Calls,
    Script,
    SyncCalls,
    break_connection,
    error_info,
    rich_status,
    scripted_server,
)
from tests.unit.client.test_client_kv_assembly import problem

both_clients = pytest.mark.parametrize("calls", BOTH_CLIENTS)
KV, MANIFEST, CHUNKS = problem()


def frames(request: pb.PullKvRequest, limit: int | None = None) -> Iterator[pb.PullKvResponse]:
    """The stream that the request asks for, or its first `limit` chunks."""
    yield pb.PullKvResponse(manifest=MANIFEST)
    for chunk in CHUNKS[request.resume_from_chunk :][:limit]:
        yield pb.PullKvResponse(chunk=chunk)


def whole(request: pb.PullKvRequest, _: grpc.ServicerContext) -> Iterator[pb.PullKvResponse]:
    yield from frames(request)


def broken_after(chunks: int) -> Any:
    def handler(request: pb.PullKvRequest, context: grpc.ServicerContext) -> Iterator[pb.PullKvResponse]:
        yield from frames(request, chunks)
        break_connection(context)

    return handler


@both_clients
def test_a_broken_stream_goes_on_from_the_chunk_where_it_stopped(calls: Calls) -> None:
    script = Script([broken_after(5), broken_after(0), broken_after(6), whole])
    with scripted_server(PullKv=script) as target:
        cache = calls(target).pull_kv("s-1")
    np.testing.assert_array_equal(cache.numpy(), KV)
    assert [request.resume_from_chunk for request in script.requests[1:]] == [5, 5, 11]
    assert [request.generation for request in script.requests] == [0, 7, 7, 7]


@both_clients
def test_a_stream_that_gets_nowhere_is_given_up(calls: Calls) -> None:
    script = Script([broken_after(0)])
    with scripted_server(PullKv=script) as target, pytest.raises(errors.UnavailableError):
        calls(target).pull_kv("s-1")
    assert len(script.requests) == FAST_RETRY.max_attempts


@both_clients
def test_a_session_that_changed_in_between_is_not_mixed(calls: Calls) -> None:
    def changed(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        status = rich_status(
            grpc.StatusCode.ABORTED, "at generation 8", error_info("GENERATION_MISMATCH", generation="8")
        )
        context.abort_with_status(status)
        yield

    with (
        scripted_server(PullKv=Script([broken_after(3), changed])) as target,
        pytest.raises(errors.GenerationMismatchError),
    ):
        calls(target).pull_kv("s-1")


@both_clients
def test_a_flipped_byte_on_the_way_is_caught(calls: Calls) -> None:
    def flipping(request: pb.PullKvRequest, _: grpc.ServicerContext) -> Iterator[pb.PullKvResponse]:
        for frame in frames(request):
            if frame.chunk.index == 9:
                frame = pb.PullKvResponse.FromString(frame.SerializeToString())
                frame.chunk.data = bytes([frame.chunk.data[0] ^ 1]) + frame.chunk.data[1:]
            yield frame

    script = Script([flipping])
    with scripted_server(PullKv=script) as target, pytest.raises(errors.ChecksumMismatchError) as caught:
        calls(target).pull_kv("s-1")
    assert caught.value.metadata["chunk_index"] == "9"
    assert len(script.requests) == 1


@both_clients
def test_a_chunk_too_many_is_an_error(calls: Calls) -> None:
    def surplus(request: pb.PullKvRequest, _: grpc.ServicerContext) -> Iterator[pb.PullKvResponse]:
        yield from frames(request)
        yield pb.PullKvResponse(chunk=CHUNKS[-1])

    with scripted_server(PullKv=surplus) as target, pytest.raises(errors.ProtocolError, match="after the last one"):
        calls(target).pull_kv("s-1")


@both_clients
def test_a_break_after_the_last_chunk_changes_nothing(calls: Calls) -> None:
    script = Script([broken_after(len(CHUNKS))])
    with scripted_server(PullKv=script) as target:
        np.testing.assert_array_equal(calls(target).pull_kv("s-1").numpy(), KV)
    assert len(script.requests) == 1


@both_clients
def test_progress_counts_bytes_to_the_end(calls: Calls) -> None:
    seen: list[tuple[int, int]] = []
    with scripted_server(PullKv=whole) as target:
        calls(target).pull_kv("s-1", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (KV.nbytes, KV.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_request_says_what_is_wanted() -> None:
    script = Script([whole])
    with scripted_server(PullKv=script) as target, pytest.raises(errors.ProtocolError):
        SyncCalls(target).pull_kv("s-1", token_range=(2, None), layer_range=(1, 3), layout="HTD", generation=4)
    request = script.requests[0]
    assert (request.range.token_start, request.range.token_end) == (2, 0)
    assert (request.range.layer_start, request.range.layer_end) == (1, 3)
    assert request.generation == 4
    assert request.chunk_bytes == 1 << 20


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"token_range": (5, 5)}, "range.token_start"),
        ({"layer_range": (-1, 2)}, "range.layer_start"),
        ({"layout": "DHT"}, "layout"),
        ({"checksum": "md5"}, "checksum"),
        ({"chunk_bytes": -1}, "chunk_bytes"),
    ],
)
def test_what_no_message_can_say_is_refused_here(options: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidFieldError) as caught:
        SyncCalls("127.0.0.1:1").pull_kv("s-1", **options)
    assert caught.value.field_violations[0].field == field
