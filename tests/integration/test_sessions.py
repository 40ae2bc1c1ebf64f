"""Sessions through gRPC: listed, renewed, updated, expired, deleted; each tenant its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from sale_prefill.v1 import prefill_service_pb2, server_service_pb2
from sale_prefill.v1 import session_service_pb2 as pb
from sale_prefill_client.tokens import token_digest
from tests.support import RunningServer, call_error, running_server, tokens_of

#: 128 tokens of 2 layers of K and V, 2 heads of 16, float32; key codes and a scale for every 32 of them.
PAGE_BYTES = 128 * 2 * 2 * 2 * 16 * 4 + 128 * 2 * 2 * 16 + 4 * 2 * 2 * 4


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(model=str(tiny_model), dtype="float32") as server:
        yield server


def retention(seconds: float) -> pb.RetentionPolicy:
    policy = pb.RetentionPolicy()
    policy.lease_duration.FromMilliseconds(int(seconds * 1000))
    return policy


def test_a_session_says_what_it_holds(server: RunningServer) -> None:
    tokens = tokens_of(70)
    server.prefill_tokens(tokens, session_id="described", labels={"document": "7"})
    session = server.session("described")
    assert session.state == pb.SESSION_STATE_READY
    assert session.num_tokens == 70
    assert session.token_digest == token_digest(tokens)
    assert session.labels == {"document": "7"}
    assert session.size_bytes == PAGE_BYTES
    assert 590 < session.remaining_lease_duration.seconds <= 600
    assert abs(session.expire_time.seconds - time.time() - 600) < 10
    assert session.kv_spec.num_layers == 2
    assert session.attention.mode == pb.ATTENTION_MODE_SALE


def test_lists_come_in_pages_oldest_first(server: RunningServer) -> None:
    for number in range(5):
        server.prefill_tokens([5], session_id=f"page-{number}")
    found, token = [], ""
    while True:
        page = server.sessions.ListSessions(pb.ListSessionsRequest(page_size=2, page_token=token))
        assert len(page.sessions) <= 2
        found += [session.session_id for session in page.sessions]
        token = page.next_page_token
        if not token:
            break
    assert [name for name in found if name.startswith("page-")] == [f"page-{number}" for number in range(5)]
    assert len(found) == len(set(found))


def test_an_expired_session_is_gone_and_says_so(server: RunningServer) -> None:
    server.prefill_tokens([5, 6], session_id="brief", retention=retention(0.3))
    used = server.server._service.engine.pool.used_bytes  # type: ignore[union-attr]
    time.sleep(1.5)  # the sweeper comes by once a second: nobody has to ask for the session
    assert server.server._service.engine.pool.used_bytes < used  # type: ignore[union-attr]
    for call in (
        lambda: server.session("brief"),
        lambda: server.decode_tokens("brief", 1),
        lambda: server.prefill_tokens([7], session_id="brief"),
    ):
        error = call_error(call)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED")
        assert "expired" in error.message
    assert server.prefill_tokens([7], session_id="brief", expected_prefix_tokens=0).session.num_tokens == 1


def test_renewal_keeps_a_session_alive_and_reports_the_missing(server: RunningServer) -> None:
    server.prefill_tokens([5], session_id="kept", retention=retention(0.8))
    for _ in range(4):
        time.sleep(0.4)
        response = server.sessions.RenewSession(pb.RenewSessionRequest(session_ids=["kept", "absent"]))
        assert [session.session_id for session in response.renewed] == ["kept"]
        assert response.missing_session_ids == ["absent"]
    longer = pb.RenewSessionRequest(session_ids=["kept"], lease_duration=Duration(seconds=500))
    assert server.sessions.RenewSession(longer).renewed[0].remaining_lease_duration.seconds >= 499
    shorter = pb.RenewSessionRequest(session_ids=["kept"], lease_duration=Duration(seconds=1))
    assert server.sessions.RenewSession(shorter).renewed[0].remaining_lease_duration.seconds >= 498


def test_update_changes_only_what_the_mask_names(server: RunningServer) -> None:
    server.prefill_tokens([5], session_id="updated", retention=retention(100), labels={"a": "1"})
    change = pb.Session(session_id="updated", labels={"b": "2"}, retention=pb.RetentionPolicy(sliding=True))
    masked = pb.UpdateSessionRequest(session=change, update_mask=FieldMask(paths=["retention.sliding"]))
    session = server.sessions.UpdateSession(masked).session
    assert (session.retention.sliding, session.retention.lease_duration.seconds) == (True, 100)
    assert session.labels == {"a": "1"}
    labels = pb.UpdateSessionRequest(session=change, update_mask=FieldMask(paths=["labels"]))
    assert server.sessions.UpdateSession(labels).session.labels == {"b": "2"}


def test_delete_frees_memory_and_is_idempotent_when_asked(server: RunningServer) -> None:
    size = server.prefill_tokens([5], session_id="deleted").session.size_bytes
    response = server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="deleted"))
    assert response.freed_bytes == size
    again = pb.DeleteSessionRequest(session_id="deleted", allow_missing=True)
    assert server.sessions.DeleteSession(again).freed_bytes == 0
    error = call_error(lambda: server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="deleted")))
    assert error.reason == "SESSION_UNKNOWN"


def test_load_and_info_describe_the_server(server: RunningServer) -> None:
    server.prefill_tokens(tokens_of(500), session_id="load")
    load = server.info.GetLoad(server_service_pb2.GetLoadRequest())
    assert load.prefill_tokens_per_second > 0
    assert 0 <= 2**30 - load.kv_capacity_bytes < PAGE_BYTES
    assert 0 < load.kv_used_bytes < load.kv_capacity_bytes
    assert load.sessions >= 1
    info = server.info.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert (info.vocabulary_size, info.max_sequence_tokens, list(info.eos_token_ids)) == (320, 4096, [2])
    assert info.device == "cpu"


def test_kv_that_does_not_fit_is_refused_with_both_numbers(tiny_model: Path) -> None:
    with running_server(model=str(tiny_model), dtype="float32", kv_memory=str(16 * PAGE_BYTES)) as server:
        server.prefill_tokens(tokens_of(1000), session_id="large")
        error = call_error(lambda: server.prefill_tokens(tokens_of(2000)))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_CAPACITY")
        assert error.metadata == {"needed_bytes": str(16 * PAGE_BYTES), "free_bytes": str(8 * PAGE_BYTES)}
        assert error.retry_after_seconds is not None
        server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="large"))
        assert server.prefill_tokens(tokens_of(2000)).session.num_tokens == 2000


def test_a_full_queue_says_when_to_come_back(tiny_model: Path) -> None:
    with running_server(model=str(tiny_model), dtype="float32", max_queued_requests=1) as server:
        running = server.prefill.Prefill(prefill_service_pb2.PrefillRequest(token_ids=tokens_of(4000)))
        next(running)
        error = call_error(lambda: server.prefill_tokens([5]))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert error.retry_after_seconds is not None
        assert error.retry_after_seconds > 0
        list(running)
        assert server.prefill_tokens([5]).session.num_tokens == 1


def test_tenants_come_from_credentials_and_never_meet(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# who may call\nred:red-secret\nblue:blue-secret\n")
    with running_server(model=str(tiny_model), dtype="float32", auth_tokens_file=str(file)) as server:

        def get(token: str | None, session_id: str = "same") -> pb.Session:
            metadata = [("authorization", f"Bearer {token}")] if token else []
            request = pb.GetSessionRequest(session_id=session_id)
            return server.sessions.GetSession(request, metadata=metadata).session

        for token in (None, "wrong-secret"):
            error = call_error(lambda token=token: get(token))  # type: ignore[misc]
            assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        request = prefill_service_pb2.PrefillRequest(token_ids=[5, 6], session_id="same")
        list(server.prefill.Prefill(request, metadata=[("authorization", "Bearer red-secret")]))
        assert get("red-secret").num_tokens == 2
        assert call_error(lambda: get("blue-secret")).reason == "SESSION_UNKNOWN"
