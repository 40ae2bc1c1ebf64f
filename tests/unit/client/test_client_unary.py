"""Unary calls: what is repeated, what is sent along, and how the server's readiness is found out."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sale_prefill.v1 import session_service_pb2 as pb
from sale_prefill_client import AsyncClient, Client, InsecureTokenWarning, errors
from sale_prefill_client._channel import is_local_target
from tests.unit.client.scripted import (
    BOTH_CLIENTS,
    FAST_RETRY,
    Calls,
    Script,
    SyncCalls,
    break_connection,
    scripted_server,
)

both_clients = pytest.mark.parametrize("calls", BOTH_CLIENTS)


def broken(_: Any, context: grpc.ServicerContext) -> None:
    break_connection(context)


def answering(response: Any) -> Any:
    return lambda _, __: response


GOT = answering(pb.GetSessionResponse(session=pb.Session(session_id="s-1", num_tokens=5, state=pb.SESSION_STATE_READY)))


class TestRepeats:
    @both_clients
    def test_a_read_is_repeated(self, calls: Calls) -> None:
        script = Script([broken, broken, GOT])
        with scripted_server(GetSession=script) as target:
            assert calls(target).get_session("s-1").num_tokens == 5
        assert len(script.requests) == 3

    @both_clients
    def test_a_delete_is_repeated_only_where_a_missing_session_is_allowed(self, calls: Calls) -> None:
        script = Script([broken, answering(pb.DeleteSessionResponse(freed_bytes=9))])
        with scripted_server(DeleteSession=script) as target:
            with pytest.raises(errors.UnavailableError):
                calls(target).delete_session("s-1")
            assert len(script.requests) == 1
            script.requests.clear()
            assert calls(target).delete_session("s-1", allow_missing=True) == 9
            assert len(script.requests) == 2

    def test_a_change_is_not_repeated(self) -> None:
        script = Script([broken])
        with (
            scripted_server(UpdateSession=script) as target,
            Client(target, retry=FAST_RETRY) as client,
            pytest.raises(errors.UnavailableError),
        ):
            client.update_session("s-1", sliding=True)
        assert len(script.requests) == 1


class TestRequests:
    @both_clients
    def test_token_and_session_travel_as_metadata(self, calls: Calls) -> None:
        script = Script([GOT])
        with scripted_server(GetSession=script) as target:
            calls(target, token="secret").get_session("s-1")
        assert script.metadata[0]["authorization"] == "Bearer secret"
        assert script.metadata[0]["x-session-id"] == "s-1"

    @pytest.mark.parametrize("session_id", ["sé", "a\nb", "x" * 20_000])
    def test_an_id_that_no_header_can_hold_travels_in_the_request_alone(self, session_id: str) -> None:
        script = Script([GOT])
        with scripted_server(GetSession=script) as target:
            SyncCalls(target).get_session(session_id)
        assert script.requests[0].session_id == session_id
        assert "x-session-id" not in script.metadata[0]

    @both_clients
    def test_pages_are_followed_to_the_end(self, calls: Calls) -> None:
        def page(request: pb.ListSessionsRequest, _: Any) -> pb.ListSessionsResponse:
            start = int(request.page_token or 0)
            sessions = [pb.Session(session_id=f"s-{index}") for index in range(start, min(start + 2, 5))]
            return pb.ListSessionsResponse(sessions=sessions, next_page_token=str(start + 2) if start + 2 < 5 else "")

        with scripted_server(ListSessions=page) as target:
            found = calls(target).list_sessions(page_size=2)
        assert [session.session_id for session in found] == [f"s-{index}" for index in range(5)]

    def test_an_update_names_just_what_it_changes(self) -> None:
        script = Script([answering(pb.UpdateSessionResponse())])
        with scripted_server(UpdateSession=script) as target, Client(target) as client:
            client.update_session("s-1", lease_seconds=1.5)
            client.update_session("s-1", sliding=False, labels={})
        assert list(script.requests[0].update_mask.paths) == ["retention.lease_duration"]
        assert script.requests[0].session.retention.lease_duration.ToMilliseconds() == 1500
        assert list(script.requests[1].update_mask.paths) == ["retention.sliding", "labels"]

    def test_what_a_session_survives_can_change(self) -> None:
        session = pb.Session(session_id="s-1", state=pb.SESSION_STATE_OFFLOADED, tier=pb.KV_TIER_DISK)
        session.durability = pb.DURABILITY_LOCAL
        session.retention.durability, session.retention.pin = pb.DURABILITY_SHARED, pb.PIN_SOFT
        script = Script([answering(pb.UpdateSessionResponse(session=session))])
        with scripted_server(UpdateSession=script) as target, Client(target) as client:
            changed = client.update_session("s-1", durability="shared", pin="soft")
        assert list(script.requests[0].update_mask.paths) == ["retention.durability", "retention.pin"]
        assert script.requests[0].session.retention.durability == pb.DURABILITY_SHARED
        assert (changed.state, changed.tier, changed.durability) == ("offloaded", "disk", "local")
        assert (changed.wanted_durability, changed.pin) == ("shared", "soft")

    @both_clients
    def test_a_fork_that_names_no_policy_sends_none(self, calls: Calls) -> None:
        script = Script([answering(pb.ForkSessionResponse(session=pb.Session(session_id="s-2")))])
        with scripted_server(ForkSession=script) as target:
            calls(target).fork_session("s-1", num_tokens=3)
            calls(target).fork_session("s-1", durability="none")
        assert not script.requests[0].HasField("retention")
        assert script.requests[1].retention.durability == pb.DURABILITY_NONE

    @pytest.mark.parametrize("lease_seconds", [-1.0, float("nan"), float("inf")])
    def test_a_lease_that_is_no_time_is_refused(self, lease_seconds: float) -> None:
        with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidFieldError, match="number of seconds"):
            client.renew_sessions(["s-1"], lease_seconds=lease_seconds)

    def test_one_id_in_place_of_a_list_is_refused(self) -> None:
        with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidFieldError, match="put the one in a list"):
            client.renew_sessions("s-1")

    def test_a_timeout_of_nothing_is_refused(self) -> None:
        with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match="must be above 0"):
            client.get_session("s-1", timeout_seconds=0)

    def test_a_closed_client_says_so(self) -> None:
        client = Client("127.0.0.1:1")
        client.close()
        with pytest.raises(RuntimeError, match="is closed"):
            client.get_session("s-1")

    def test_an_async_client_may_be_made_outside_a_loop(self) -> None:
        AsyncClient("127.0.0.1:1")


class TestReadiness:
    @both_clients
    def test_it_waits_until_the_service_serves(self, calls: Calls) -> None:
        servicer = health.HealthServicer()
        servicer.set("sale_prefill.v1.PrefillService", health_pb2.HealthCheckResponse.NOT_SERVING)
        serving = health_pb2.HealthCheckResponse.SERVING
        add = lambda server: health_pb2_grpc.add_HealthServicer_to_server(servicer, server)  # noqa: E731
        with scripted_server(add=add) as target:
            with pytest.raises(errors.NotReadyError, match="not loaded and warm"):
                calls(target).wait_until_ready(0.3)
            threading.Timer(0.3, servicer.set, ("sale_prefill.v1.PrefillService", serving)).start()
            calls(target).wait_until_ready(10)

    @both_clients
    def test_a_server_that_is_not_there_is_unavailable(self, calls: Calls) -> None:
        with pytest.raises(errors.UnavailableError, match="could not be reached") as caught:
            calls("127.0.0.1:1").wait_until_ready(0.4)
        assert not isinstance(caught.value, errors.NotReadyError)

    def test_a_server_without_health_is_no_reason_to_wait(self) -> None:
        with scripted_server() as target, pytest.raises(errors.NotImplementedByServerError):
            SyncCalls(target).wait_until_ready(30)


class TestInsecureToken:
    @pytest.mark.parametrize(
        ("target", "local"),
        [
            ("127.0.0.1:50051", True),
            ("127.9.9.9", True),
            ("localhost:1", True),
            ("[::1]:1", True),
            ("::1", True),
            ("unix:/run/sale", True),
            ("unix-abstract:sale", True),
            ("dns:///localhost:1", True),
            ("ipv4:127.0.0.1:1", True),
            ("ipv6:%5B::1%5D:1", True),
            ("10.0.0.1:50051", False),
            ("example.org:50051", False),
            ("localhost.example.org:1", False),
            ("dns:///example.org", False),
            ("[2001:db8::1]:1", False),
        ],
    )
    def test_what_stays_on_this_machine(self, target: str, local: bool) -> None:
        assert is_local_target(target) is local

    def test_a_token_in_the_clear_to_another_host_warns(self) -> None:
        with pytest.warns(InsecureTokenWarning, match=r"10\.0\.0\.1:1 without encryption") as caught:
            Client("10.0.0.1:1", token="secret")
        assert caught[0].filename == __file__

    def test_a_token_to_this_machine_does_not(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Client("127.0.0.1:1", token="secret")
