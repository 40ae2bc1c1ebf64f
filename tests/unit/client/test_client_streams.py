"""Streams survive broken connections, never wait for ever, and end on the server when the caller goes away."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from sale_prefill.v1 import prefill_service_pb2
from sale_prefill_client import (
    AsyncClient,
    Client,
    PrefillAccepted,
    PrefillProgress,
    PrefillResult,
    RetryPolicy,
    errors,
)
from tests.unit.client.scripted import (
    ACCEPTED,
    BOTH_CLIENTS,
    DECODE_ACCEPTED,
    DECODE_RESULT,
    FAST_RETRY,
    JOINED,
    RESULT,
    Calls,
    Handler,
    Script,
    SyncCalls,
    break_connection,
    decode_tokens,
    error_info,
    prefill_events,
    retry_info,
    rich_status,
    scripted_server,
)

both_clients = pytest.mark.parametrize("calls", BOTH_CLIENTS)


def saying(*responses: Any, then: str = "") -> Handler:
    """A handler that sends responses and then ends well, breaks the connection, or keeps silent."""

    def handler(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from responses
        if then == "break":
            break_connection(context)
        if then == "silence":
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait(10)

    return handler


PREFILL_DONE = saying(*prefill_events(JOINED, 8, RESULT))


class TestPrefill:
    @both_clients
    def test_a_broken_connection_is_made_again_and_the_same_request_joined(self, calls: Calls) -> None:
        script = Script([saying(*prefill_events(ACCEPTED, 4), then="break"), PREFILL_DONE])
        with scripted_server(Prefill=script) as target:
            result = calls(target).prefill([1, 2, 3])
        assert result.session_id == "s-1"
        assert result.request_id == script.requests[0].request_id
        assert len(script.requests) == 2
        assert script.requests[0] == script.requests[1]
        assert script.requests[0].request_id

    @both_clients
    def test_a_repeat_goes_to_the_session_that_the_first_attempt_was_given(self, calls: Calls) -> None:
        script = Script([saying(*prefill_events(ACCEPTED), then="break"), PREFILL_DONE])
        with scripted_server(Prefill=script) as target:
            calls(target).prefill([1])
        assert "x-session-id" not in script.metadata[0]
        assert script.metadata[1]["x-session-id"] == "s-1"

    @both_clients
    def test_it_gives_up_after_so_many_attempts_without_progress(self, calls: Calls) -> None:
        script = Script([saying(*prefill_events(ACCEPTED, 4), then="break")])
        with (
            scripted_server(Prefill=script) as target,
            pytest.raises(errors.UnavailableError, match="connection broke"),
        ):
            calls(target).prefill([1])
        assert len(script.requests) == FAST_RETRY.max_attempts

    @both_clients
    def test_progress_earns_new_attempts(self, calls: Calls) -> None:
        steps = [saying(*prefill_events(ACCEPTED, done), then="break") for done in (1, 2, 3, 4, 5, 6)]
        script = Script([*steps, PREFILL_DONE])
        with scripted_server(Prefill=script) as target:
            assert calls(target).prefill([1]).session.num_tokens == 8
        assert len(script.requests) == 7

    @both_clients
    def test_the_wait_that_the_server_asks_for_is_kept(self, calls: Calls) -> None:
        def not_ready(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            details = (error_info("NOT_READY"), retry_info(0.3))
            context.abort_with_status(rich_status(grpc.StatusCode.UNAVAILABLE, "loading", *details))
            yield

        script = Script([not_ready, PREFILL_DONE])
        with scripted_server(Prefill=script) as target:
            calls(target).prefill([1])
        assert script.times[1] - script.times[0] >= 0.3

    @both_clients
    def test_a_wait_past_the_timeout_is_not_begun(self, calls: Calls) -> None:
        def not_ready(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            details = (error_info("NOT_READY"), retry_info(60))
            context.abort_with_status(rich_status(grpc.StatusCode.UNAVAILABLE, "loading", *details))
            yield

        started = time.monotonic()
        with scripted_server(Prefill=not_ready) as target, pytest.raises(errors.DeadlineExceededError, match="loading"):
            calls(target).prefill([1], timeout_seconds=2)
        assert time.monotonic() - started < 2

    @both_clients
    @pytest.mark.parametrize(
        ("code", "reason"),
        [(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"), (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")],
    )
    def test_only_unavailable_is_tried_again(self, calls: Calls, code: grpc.StatusCode, reason: str) -> None:
        def refuse(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            context.abort_with_status(rich_status(code, "no", error_info(reason)))
            yield

        script = Script([refuse])
        with scripted_server(Prefill=script) as target, pytest.raises(errors.SalePrefillError) as caught:
            calls(target).prefill([1])
        assert caught.value.reason == reason
        assert len(script.requests) == 1

    @both_clients
    def test_no_server_at_all_is_unavailable_after_the_attempts(self, calls: Calls) -> None:
        with pytest.raises(errors.UnavailableError):
            calls("127.0.0.1:1").prefill([1])

    @both_clients
    def test_a_silent_server_is_noticed_and_told(self, calls: Calls) -> None:
        script = Script([saying(*prefill_events(ACCEPTED, 4), then="silence")])
        with scripted_server(Prefill=script) as target:
            with pytest.raises(errors.InactivityTimeoutError, match=r"nothing for 0\.3 seconds"):
                calls(target, inactivity_timeout_seconds=0.3).prefill([1])
            assert script.ended.wait(5)
        assert len(script.requests) == 1

    @both_clients
    def test_a_slow_server_that_gives_signs_of_life_is_waited_for(self, calls: Calls) -> None:
        def slow(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            for event in prefill_events(ACCEPTED, 1, 2, 3, 4, 5, RESULT):
                time.sleep(0.1)
                yield event

        with scripted_server(Prefill=slow) as target:
            result = calls(target, inactivity_timeout_seconds=0.4).prefill([1])
        assert result.session_id == "s-1"

    @both_clients
    def test_the_timeout_covers_everything(self, calls: Calls) -> None:
        script = Script([saying(*prefill_events(ACCEPTED), then="silence")])
        with scripted_server(Prefill=script) as target, pytest.raises(errors.DeadlineExceededError, match=r"0\.3 sec"):
            calls(target).prefill([1], timeout_seconds=0.3)

    @both_clients
    def test_a_stream_without_its_result_is_an_error(self, calls: Calls) -> None:
        with (
            scripted_server(Prefill=saying(*prefill_events(ACCEPTED, 4))) as target,
            pytest.raises(errors.ProtocolError, match="without its result"),
        ):
            calls(target).prefill([1])

    @both_clients
    def test_the_server_sees_a_call_that_ended_and_no_cancelled_one(self, calls: Calls) -> None:
        active_after_result: list[bool] = []

        def lingering(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from prefill_events(ACCEPTED, RESULT)
            time.sleep(0.2)
            active_after_result.append(context.is_active())

        with scripted_server(Prefill=lingering) as target:
            calls(target).prefill([1])
        assert active_after_result == [True]

    @both_clients
    def test_progress_is_reported_and_reaches_its_end(self, calls: Calls) -> None:
        seen: list[PrefillProgress] = []
        with scripted_server(Prefill=saying(*prefill_events(ACCEPTED, 2, 5, RESULT))) as target:
            calls(target).prefill([1], progress=seen.append)
        assert [event.computed_tokens for event in seen] == [2, 5, 8]
        assert seen[-1].completed_ratio == 1.0

    def test_a_bar_of_tokens_names_the_phase(self, capsys: pytest.CaptureFixture[str]) -> None:
        waiting = prefill_service_pb2.PrefillProgress(total_tokens=8, queued=True)
        with scripted_server(Prefill=saying(*prefill_events(ACCEPTED, waiting, 5, RESULT))) as target:
            SyncCalls(target).prefill([1], progress=True)
        shown = capsys.readouterr().err
        assert "queued" in shown
        assert "prefilling: 100%" in shown
        assert "8/8" in shown

    def test_events_come_one_by_one_and_typed(self) -> None:
        with scripted_server(Prefill=saying(*prefill_events(ACCEPTED, 2, RESULT))) as target, Client(target) as client:
            events = list(client.prefill_events([1]))
        assert [type(event) for event in events] == [PrefillAccepted, PrefillProgress, PrefillResult]

    def test_leaving_the_events_early_cancels_the_request(self) -> None:
        script = Script([saying(*prefill_events(ACCEPTED, 2), then="silence")])
        with scripted_server(Prefill=script) as target, Client(target) as client:
            for event in client.prefill_events([1]):
                if isinstance(event, PrefillProgress):
                    break
            gc.collect()
            assert script.ended.wait(5)

    async def test_cancelling_the_task_cancels_the_request(self) -> None:
        script = Script([saying(*prefill_events(ACCEPTED), then="silence")])
        with scripted_server(Prefill=script) as target:
            async with AsyncClient(target) as client:
                task = asyncio.create_task(client.prefill([1]))
                await asyncio.sleep(0.3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await asyncio.to_thread(script.ended.wait, 5)


class TestDecode:
    @both_clients
    def test_tokens_sent_again_after_a_break_are_yielded_once(self, calls: Calls) -> None:
        script = Script(
            [
                saying(DECODE_ACCEPTED, decode_tokens(11), decode_tokens(12), then="break"),
                saying(DECODE_ACCEPTED, decode_tokens(11, 12, 13), DECODE_RESULT),
            ]
        )
        with scripted_server(Decode=script) as target:
            tokens, result = calls(target).decode("s-1", max_new_tokens=3)
        assert [token.token_id for token in tokens] == [11, 12, 13]
        assert result.finish_reason == "length"
        assert script.requests[0] == script.requests[1]
        assert script.metadata[0]["x-session-id"] == "s-1"

    @both_clients
    def test_a_break_within_what_is_sent_again_loses_nothing(self, calls: Calls) -> None:
        script = Script(
            [
                saying(DECODE_ACCEPTED, decode_tokens(11, 12), then="break"),
                saying(DECODE_ACCEPTED, decode_tokens(11), then="break"),
                saying(DECODE_ACCEPTED, decode_tokens(11, 12), decode_tokens(13), DECODE_RESULT),
            ]
        )
        with scripted_server(Decode=script) as target:
            tokens, _ = calls(target).decode("s-1")
        assert [token.token_id for token in tokens] == [11, 12, 13]

    @both_clients
    def test_other_tokens_after_a_break_are_an_error(self, calls: Calls) -> None:
        script = Script(
            [
                saying(DECODE_ACCEPTED, decode_tokens(11, 12), then="break"),
                saying(DECODE_ACCEPTED, decode_tokens(11, 99), DECODE_RESULT),
            ]
        )
        with (
            scripted_server(Decode=script) as target,
            pytest.raises(errors.ProtocolError, match="sent token 99 at position 1, where it had sent 12"),
        ):
            calls(target).decode("s-1")

    @both_clients
    def test_cancel_ends_the_iteration_without_a_result(self, calls: Calls) -> None:
        script = Script([saying(DECODE_ACCEPTED, decode_tokens(11), decode_tokens(12), then="silence")])
        with scripted_server(Decode=script) as target:
            tokens, result = calls(target).decode("s-1", stop_after=2)
            assert script.ended.wait(5)
        assert [token.token_id for token in tokens] == [11, 12]
        assert result is None

    def test_cancel_from_another_thread_ends_a_wait(self) -> None:
        with (
            scripted_server(Decode=saying(DECODE_ACCEPTED, decode_tokens(11), then="silence")) as target,
            Client(target) as client,
            client.decode("s-1") as stream,
        ):
            threading.Timer(0.2, stream.cancel).start()
            assert [token.token_id for token in stream] == [11]

    async def test_cancel_from_another_task_ends_a_wait(self) -> None:
        with scripted_server(Decode=saying(DECODE_ACCEPTED, decode_tokens(11), then="silence")) as target:
            async with AsyncClient(target) as client, client.decode("s-1") as stream:
                asyncio.get_running_loop().call_later(0.2, stream.cancel)
                assert [token.token_id async for token in stream] == [11]

    def test_leaving_the_block_early_cancels_the_request(self) -> None:
        script = Script([saying(DECODE_ACCEPTED, decode_tokens(11), then="silence")])
        with scripted_server(Decode=script) as target, Client(target) as client:
            with client.decode("s-1") as stream:
                next(stream)
            assert script.ended.wait(5)

    def test_a_stream_that_is_dropped_cancels_the_request(self) -> None:
        script = Script([saying(DECODE_ACCEPTED, decode_tokens(11), then="silence")])
        with scripted_server(Decode=script) as target, Client(target) as client:
            stream = client.decode("s-1")
            next(stream)
            del stream
            gc.collect()
            assert script.ended.wait(5)

    @both_clients
    def test_a_cancel_by_the_server_is_an_error(self, calls: Calls) -> None:
        def deleted(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield DECODE_ACCEPTED
            status = rich_status(grpc.StatusCode.CANCELLED, "the session was deleted", error_info("CANCELLED"))
            context.abort_with_status(status)

        with (
            scripted_server(Decode=deleted) as target,
            pytest.raises(errors.RequestCancelledError, match="session was deleted"),
        ):
            calls(target).decode("s-1")

    @both_clients
    def test_a_stream_without_its_result_is_an_error(self, calls: Calls) -> None:
        with (
            scripted_server(Decode=saying(DECODE_ACCEPTED, decode_tokens(11))) as target,
            pytest.raises(errors.ProtocolError, match="without its result"),
        ):
            calls(target).decode("s-1")

    def test_generate_returns_everything(self) -> None:
        with (
            scripted_server(Decode=saying(DECODE_ACCEPTED, decode_tokens(11, 12), DECODE_RESULT)) as target,
            Client(target) as client,
        ):
            generation = client.generate("s-1", [5], max_new_tokens=2, stop_token_ids=[12])
        assert generation.token_ids == [11, 12]
        assert generation.result.finish_reason == "length"

    def test_nothing_is_sent_before_the_first_token_is_asked_for(self) -> None:
        script = Script([saying(DECODE_RESULT)])
        with scripted_server(Decode=script) as target, Client(target) as client:
            stream = client.decode("s-1")
            assert script.requests == []
            assert list(stream) == []
            assert len(script.requests) == 1


def test_no_watchdog_outlives_its_stream() -> None:
    with (
        scripted_server(Decode=saying(DECODE_ACCEPTED, decode_tokens(11), DECODE_RESULT)) as target,
        Client(target) as client,
    ):
        for _ in range(3):
            client.generate("s-1")
    deadline = time.monotonic() + 5
    while [thread for thread in threading.enumerate() if "watchdog" in thread.name] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [thread.name for thread in threading.enumerate() if "watchdog" in thread.name] == []


def test_waits_grow_up_to_their_limit_and_vary() -> None:
    policy = RetryPolicy(initial_backoff_seconds=1, max_backoff_seconds=5, multiplier=2, jitter=lambda: 1.0)
    assert [policy.backoff_seconds(failures) for failures in (1, 2, 3, 4, 9)] == [1, 2, 4, 5, 5]
    policy = RetryPolicy(initial_backoff_seconds=1, jitter=lambda: 0.0)
    assert policy.backoff_seconds(1) == 0.5


def test_a_policy_without_a_single_attempt_is_refused() -> None:
    with pytest.raises(ValueError, match="max_attempts is 0"):
        RetryPolicy(max_attempts=0)
