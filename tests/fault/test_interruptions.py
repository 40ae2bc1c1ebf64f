"""Callers who go away, come back, come twice or get in each other's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from sale_prefill.v1 import prefill_service_pb2 as pb
from sale_prefill.v1 import session_service_pb2
from tests.support import RunningServer, call_error, decode_error, running_server, save_tiny_llama, tokens_of

PROMPT_TOKENS = 3000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model that takes seconds for a prompt, in many small chunks."""
    directory: Path = save_tiny_llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=32, hidden_size=256)
    with running_server(model=str(directory), dtype="float32", chunk_tokens=256, attention="dense") as server:
        yield server


def start_prefill(server: RunningServer, **fields: object) -> grpc.RpcContext:
    """A prefill that has computed at least one chunk."""
    call = server.prefill.Prefill(pb.PrefillRequest(token_ids=tokens_of(PROMPT_TOKENS), **fields))
    for event in call:
        if event.progress.computed_tokens:
            return call
    raise AssertionError("the prefill ended too soon to interrupt it")


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def idle(server: RunningServer) -> bool:
    load = server.server._service.scheduler.load()  # type: ignore[union-attr]
    return load.running_requests + load.queued_requests == 0


def test_a_client_that_leaves_stops_the_work_and_keeps_what_was_computed(server: RunningServer) -> None:
    start_prefill(server, session_id="left").cancel()
    wait_for(lambda: idle(server), seconds=2.0)
    session = server.session("left")
    assert session.state == session_service_pb2.SESSION_STATE_PARTIAL
    assert 0 < session.num_tokens < PROMPT_TOKENS
    assert session.num_tokens % 256 == 0
    assert session.remaining_lease_duration.seconds > 0


def test_a_client_that_leaves_may_ask_for_everything_to_be_freed(server: RunningServer) -> None:
    used_before = server.server._service.engine.pool.used_bytes  # type: ignore[union-attr]
    start_prefill(server, session_id="freed", on_interrupt=pb.INTERRUPT_POLICY_FREE).cancel()
    wait_for(lambda: idle(server), seconds=2.0)
    error = call_error(lambda: server.session("freed"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")
    assert server.server._service.engine.pool.used_bytes == used_before  # type: ignore[union-attr]


def test_an_interrupted_append_that_frees_cuts_the_session_back(server: RunningServer) -> None:
    held = server.prefill_tokens(tokens_of(100), session_id="cut-back").session
    start_prefill(server, session_id="cut-back", on_interrupt=pb.INTERRUPT_POLICY_FREE).cancel()
    wait_for(lambda: idle(server), seconds=2.0)
    after = server.session("cut-back")
    assert after.num_tokens == 100
    assert after.token_digest == held.token_digest
    assert after.state == session_service_pb2.SESSION_STATE_READY


def test_a_deadline_stops_the_work_like_a_disconnect(server: RunningServer) -> None:
    request = pb.PrefillRequest(token_ids=tokens_of(PROMPT_TOKENS), session_id="late")
    error = call_error(lambda: server.prefill.Prefill(request, timeout=0.6))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: idle(server), seconds=2.0)


def test_a_retry_with_the_same_request_id_goes_on_where_the_first_call_stopped(server: RunningServer) -> None:
    expected = server.prefill_tokens(tokens_of(PROMPT_TOKENS), session_id="whole")
    start_prefill(server, session_id="resumed", request_id="resume-me").cancel()
    wait_for(lambda: idle(server), seconds=2.0)
    kept = server.session("resumed").num_tokens
    request = pb.PrefillRequest(token_ids=tokens_of(PROMPT_TOKENS), session_id="resumed", request_id="resume-me")
    first, *_, last = server.prefill.Prefill(request)
    assert first.accepted.joined
    assert first.accepted.cached_tokens == kept
    assert last.result.session.num_tokens == PROMPT_TOKENS
    assert [entry.token_id for entry in last.result.top_logits] == [entry.token_id for entry in expected.top_logits]


def test_two_calls_with_one_request_id_share_one_computation(server: RunningServer) -> None:
    before = _computed_tokens(server)
    request = pb.PrefillRequest(token_ids=tokens_of(PROMPT_TOKENS), session_id="shared", request_id="share-me")
    results: list[pb.PrefillResult] = []
    calls = [
        threading.Thread(target=lambda: results.append(list(server.prefill.Prefill(request))[-1].result))
        for _ in range(3)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    results.append(list(server.prefill.Prefill(request))[-1].result)  # after the end: the stored result
    assert len({result.session.generation for result in results}) == 1
    assert all(result == results[0] for result in results)
    assert _computed_tokens(server) - before == PROMPT_TOKENS


def test_one_of_two_followers_may_leave(server: RunningServer) -> None:
    leaver = start_prefill(server, session_id="one-leaves", request_id="one-leaves")
    request = pb.PrefillRequest(token_ids=tokens_of(PROMPT_TOKENS), session_id="one-leaves", request_id="one-leaves")
    stayer = server.prefill.Prefill(request)
    assert next(stayer).accepted.joined
    leaver.cancel()
    assert list(stayer)[-1].result.session.num_tokens == PROMPT_TOKENS


def test_a_request_id_with_another_request_is_refused(server: RunningServer) -> None:
    server.prefill_tokens(tokens_of(50), request_id="once")
    error = call_error(lambda: server.prefill_tokens(tokens_of(51), request_id="once"))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert error.fields == ["request_id"]


def test_a_retried_decode_gets_the_same_tokens_again(server: RunningServer) -> None:
    server.prefill_tokens(tokens_of(60), session_id="replayed")
    options = {"request_id": "replay-me", "ignore_eos": True, "sampling": pb.SamplingOptions(temperature=1.0)}
    first = server.decode_tokens("replayed", 8, **options)
    assert server.decode_tokens("replayed", 8, **options) == first
    assert server.session("replayed").num_tokens == 68


def test_an_interrupted_decode_goes_on_with_its_retry(server: RunningServer) -> None:
    server.prefill_tokens(tokens_of(60), session_id="decode-whole")
    expected = server.decode_tokens("decode-whole", 40, ignore_eos=True)
    server.prefill_tokens(tokens_of(60), session_id="decode-cut")
    request = pb.DecodeRequest(session_id="decode-cut", max_new_tokens=40, ignore_eos=True, request_id="decode-cut")
    call = server.prefill.Decode(request)
    for event in call:
        if event.tokens.tokens:
            break
    call.cancel()
    wait_for(lambda: idle(server), seconds=2.0)
    assert 60 < server.session("decode-cut").num_tokens < 100
    tokens = [token.token_id for event in server.prefill.Decode(request) for token in event.tokens.tokens]
    assert tokens == expected


def test_a_busy_session_refuses_others_and_ends_only_by_force(server: RunningServer) -> None:
    call = start_prefill(server, session_id="busy")
    for attempt in (
        lambda: server.prefill_tokens([5], session_id="busy"),
        lambda: server.decode_tokens("busy", 1),
        lambda: server.sessions.DeleteSession(session_service_pb2.DeleteSessionRequest(session_id="busy")),
    ):
        error = call_error(attempt)
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "SESSION_BUSY")
        assert "'busy'" in error.message
    server.sessions.DeleteSession(session_service_pb2.DeleteSessionRequest(session_id="busy", force=True))
    with pytest.raises(grpc.RpcError) as stopped:
        list(call)
    assert decode_error(stopped.value).reason == "CANCELLED"
    wait_for(lambda: idle(server), seconds=2.0)
    assert call_error(lambda: server.session("busy")).reason == "SESSION_UNKNOWN"


def test_an_engine_failure_ends_that_request_only(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    service = server.server._service
    assert service is not None
    held = server.prefill_tokens(tokens_of(100), session_id="survivor").session

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a kernel gave up")

    with monkeypatch.context() as patch:
        patch.setattr(service.engine.model.module.model.layers[20].mlp, "forward", broken)
        error = call_error(lambda: server.prefill_tokens(tokens_of(600, seed=1), session_id="survivor"))
        created = call_error(lambda: server.prefill_tokens(tokens_of(600), session_id="never-made"))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
    assert "a kernel gave up" in error.message
    assert created.reason == "ENGINE_FAILED"
    after = server.session("survivor")
    assert (after.num_tokens, after.token_digest) == (100, held.token_digest)
    assert call_error(lambda: server.session("never-made")).reason == "SESSION_UNKNOWN"
    whole = server.prefill_tokens(tokens_of(100) + tokens_of(50, seed=2))
    appended = server.prefill_tokens(tokens_of(50, seed=2), session_id="survivor")
    assert [entry.token_id for entry in appended.top_logits] == [entry.token_id for entry in whole.top_logits]


def test_a_reader_that_does_not_read_blocks_nobody(server: RunningServer) -> None:
    request = pb.PrefillRequest(token_ids=tokens_of(PROMPT_TOKENS), session_id="unread")
    unread = server.prefill.Prefill(request)
    started = time.monotonic()
    assert server.prefill_tokens(tokens_of(100)).session.num_tokens == 100
    assert time.monotonic() - started < 30
    assert list(unread)[-1].result.session.num_tokens == PROMPT_TOKENS


def _computed_tokens(server: RunningServer) -> float:
    value = server.server._metrics.registry.get_sample_value("sale_prefill_tokens_total", {"source": "computed"})
    assert value is not None
    return value
