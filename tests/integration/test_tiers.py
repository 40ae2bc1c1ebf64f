"""Sessions that outlive the device's memory and the process: what was promised is kept, what is lost is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sale_prefill.v1 import prefill_service_pb2 as prefill_pb
from sale_prefill.v1 import session_service_pb2 as pb
from sale_prefill_client import Client
from sale_prefill_client.tokens import token_digest
from sale_prefill_server.config import ConfigError
from sale_prefill_server.store.located import LayerPart
from tests.support import RunningServer, call_error, running_server, tokens_of

PAGE_BYTES = 128 * 2 * 2 * 2 * 16 * 4 + 128 * 2 * 2 * 16 + 4 * 2 * 2 * 4


def keep(durability: pb.Durability, seconds: int = 600, pin: pb.Pin = pb.PIN_UNSPECIFIED) -> pb.RetentionPolicy:
    policy = pb.RetentionPolicy(durability=durability, pin=pin)
    policy.lease_duration.FromSeconds(seconds)
    return policy


def logits(result: prefill_pb.PrefillResult) -> list[tuple[int, float]]:
    return [(item.token_id, item.logit) for item in result.top_logits]


def wait_until(condition: object) -> None:
    end = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, object]:
    return {"model": str(tiny_model), "dtype": "float32", "chunk_tokens": 512, "kv_disk": str(tmp_path / "kv")}


def test_a_session_that_was_promised_local_is_there_after_a_restart(settings: dict[str, object]) -> None:
    prompt = tokens_of(1500)
    with running_server(**settings) as server:
        kept = server.prefill_tokens(prompt, session_id="kept", retention=keep(pb.DURABILITY_LOCAL), labels={"a": "b"})
        assert kept.session.durability == pb.DURABILITY_LOCAL
        server.prefill_tokens(tokens_of(300, seed=1), session_id="unkept")
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="kept", new_session_id="fork"))
        expected = server.decode_tokens("fork", 12)
    with running_server(**settings) as server:
        session = server.session("kept")
        assert (session.state, session.tier) == (pb.SESSION_STATE_OFFLOADED, pb.KV_TIER_DISK)
        assert (session.num_tokens, session.token_digest) == (1500, token_digest(prompt))
        assert dict(session.labels) == {"a": "b"}
        assert session.generation == kept.session.generation
        assert server.load().kv_used_bytes == 0
        assert server.decode_tokens("kept", 12) == expected
        assert server.metric("sale_prefill_tokens_total", source="store") == 1500
        assert server.metric("sale_prefill_tokens_total", source="computed") == 0
        error = call_error(lambda: server.session("unkept"))
        assert error.reason == "SESSION_UNKNOWN"


def test_appends_and_decoded_tokens_are_kept_too(settings: dict[str, object]) -> None:
    policy = keep(pb.DURABILITY_LOCAL)
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(700), session_id="grown", retention=policy)
        server.prefill_tokens(tokens_of(90, seed=2), session_id="grown")
        answer = server.decode_tokens("grown", 5)
        digest = server.session("grown").token_digest
    assert digest == token_digest([*tokens_of(700), *tokens_of(90, seed=2), *answer])
    with running_server(**settings) as server:
        assert server.session("grown").token_digest == digest
        more = server.decode_tokens("grown", 5)
    with running_server(**settings, prefix_reuse=False) as server:
        server.prefill_tokens([*tokens_of(700), *tokens_of(90, seed=2)], session_id="again")
        assert server.decode_tokens("again", 10) == answer + more


def test_a_prompt_takes_its_prefix_from_the_disk(settings: dict[str, object]) -> None:
    prompt = tokens_of(1300)
    with running_server(**settings) as server:
        alone = server.prefill_tokens([*prompt, 7], retention=keep(pb.DURABILITY_LOCAL))
    with running_server(**{**settings, "prefix_reuse": True}) as server:
        result = server.prefill_tokens([*prompt, 7])
        stats = result.stats
        assert (stats.computed_tokens, stats.cached_tokens, stats.restored_tokens) == (21, 1280, 1280)
        assert logits(result) == logits(alone)


def test_damaged_blocks_are_noticed_and_computed_again(settings: dict[str, object], tmp_path: Path) -> None:
    prompt = tokens_of(1500)
    with running_server(**settings) as server:
        server.prefill_tokens(prompt, session_id="kept", retention=keep(pb.DURABILITY_LOCAL))
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="kept", new_session_id="fork"))
        expected = server.decode_tokens("fork", 6)
    files = sorted((tmp_path / "kv" / "blocks").rglob("*.kv"), key=lambda file: file.stat().st_size)
    whole = [file for file in files if file.stat().st_size > 30_000]
    for file in whole[::3]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with running_server(**settings) as server:
        assert server.decode_tokens("kept", 6) == expected
        assert server.metric("sale_prefill_tokens_total", source="computed") > 0
        assert server.session("kept").num_tokens == 1506
    assert list((tmp_path / "kv" / "quarantine").iterdir())


def test_what_was_deleted_does_not_come_back(settings: dict[str, object]) -> None:
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(300), session_id="gone", retention=keep(pb.DURABILITY_LOCAL))
        server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="gone"))
    with running_server(**settings) as server:
        assert call_error(lambda: server.session("gone")).reason == "SESSION_UNKNOWN"


def test_a_changed_policy_is_kept(settings: dict[str, object]) -> None:
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(300), session_id="relabelled", retention=keep(pb.DURABILITY_LOCAL))
        request = pb.UpdateSessionRequest(
            session=pb.Session(
                session_id="relabelled", labels={"now": "this"}, retention=keep(pb.DURABILITY_LOCAL, 900)
            )
        )
        request.update_mask.paths.extend(["labels", "retention.lease_duration"])
        server.sessions.UpdateSession(request)
        wait_until(lambda: server.session("relabelled").durability == pb.DURABILITY_LOCAL)
    with running_server(**settings) as server:
        session = server.session("relabelled")
        assert (dict(session.labels), session.retention.lease_duration.seconds) == ({"now": "this"}, 900)


def test_full_memory_sends_idle_sessions_away_and_brings_them_back(settings: dict[str, object]) -> None:
    with running_server(**settings, kv_memory=str(20 * PAGE_BYTES), kv_host_memory="64M") as server:
        for name, pin in (("first", pb.PIN_NONE), ("soft", pb.PIN_SOFT), ("hard", pb.PIN_HARD)):
            server.prefill_tokens(
                tokens_of(600, seed=len(name)), session_id=name, retention=keep(pb.DURABILITY_NONE, pin=pin)
            )
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="first", new_session_id="fork"))
        expected = server.decode_tokens("fork", 5)
        server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="fork"))
        server.prefill_tokens(tokens_of(1200, seed=9), session_id="large")
        states = {name: server.session(name) for name in ("first", "soft", "hard")}
        assert states["hard"].state == pb.SESSION_STATE_READY
        assert (states["first"].state, states["first"].tier) == (pb.SESSION_STATE_OFFLOADED, pb.KV_TIER_HOST)
        assert server.decode_tokens("first", 5) == expected


def test_hard_pins_have_a_quota(settings: dict[str, object]) -> None:
    with running_server(**settings, pin_quota=str(4 * PAGE_BYTES)) as server:
        pinned = keep(pb.DURABILITY_NONE, pin=pb.PIN_HARD)
        server.prefill_tokens(tokens_of(300), session_id="pinned", retention=pinned)
        error = call_error(lambda: server.prefill_tokens(tokens_of(200), retention=pinned))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PIN_QUOTA")
        assert error.metadata == {"needed_bytes": str(5 * PAGE_BYTES), "quota_bytes": str(4 * PAGE_BYTES)}


def test_a_promise_that_the_server_cannot_make_is_refused(tiny_model: Path) -> None:
    with running_server(model=str(tiny_model), dtype="float32") as server:
        error = call_error(lambda: server.prefill_tokens([5], retention=keep(pb.DURABILITY_LOCAL)))
        assert (error.reason, error.fields) == ("INVALID_FIELD", ["retention.durability"])


def test_an_offloaded_session_can_be_pulled_and_forked(settings: dict[str, object]) -> None:
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(500), session_id="kept", retention=keep(pb.DURABILITY_LOCAL))
        with Client(server.target) as client:
            before = client.pull_kv("kept")
    with running_server(**settings) as server, Client(server.target) as client:
        after = client.pull_kv("kept")
        assert after.buffer.tobytes() == before.buffer.tobytes()
    with running_server(**settings) as server:
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="kept", new_session_id="fork"))
        assert server.session("fork").num_tokens == 500
        assert server.session("kept").state == pb.SESSION_STATE_READY


def test_a_fork_waits_for_the_last_layer_that_is_brought_back(settings: dict[str, object]) -> None:
    with running_server(**settings) as server, Client(server.target) as client:
        server.prefill_tokens(tokens_of(500), session_id="kept", retention=keep(pb.DURABILITY_LOCAL))
        before = client.pull_kv("kept")
    with running_server(**settings) as server, Client(server.target) as client:
        slow_down_later_layers(server, seconds=0.3)
        client.fork_session("kept", new_session_id="fork")
        assert client.pull_kv("fork").buffer.tobytes() == before.buffer.tobytes()


def slow_down_later_layers(server: RunningServer, seconds: float) -> None:
    """A tier that takes its time between a block's layers."""
    store = server.server._service.archive._store  # type: ignore[union-attr]
    read = store.read

    def slowly(*arguments: Any, **options: Any) -> Iterator[LayerPart]:
        for part in read(*arguments, **options):
            if part.layer:
                time.sleep(seconds)
            yield part

    store.read = slowly  # type: ignore[method-assign]


def test_forks_and_changed_policies_are_as_durable_as_promised_when_the_answer_comes(
    settings: dict[str, object],
) -> None:
    with running_server(**settings) as server, Client(server.target) as client:
        server.prefill_tokens(tokens_of(500), session_id="plain")
        assert client.fork_session("plain", new_session_id="fork", num_tokens=300, durability="local").durability == (
            "local"
        )
        assert client.update_session("plain", durability="local").durability == "local"
    with running_server(**settings) as server, Client(server.target) as client:
        assert {session.session_id: session.num_tokens for session in client.list_sessions()} == {
            "fork": 300,
            "plain": 500,
        }


def test_a_fork_makes_room_for_the_page_that_it_copies(settings: dict[str, object]) -> None:
    with running_server(**settings, attention="dense", kv_memory=str(11 * PAGE_BYTES)) as server:
        server.prefill_tokens(tokens_of(600), session_id="idle", retention=keep(pb.DURABILITY_LOCAL))
        server.prefill_tokens(tokens_of(700, seed=1), session_id="parent", retention=keep(pb.DURABILITY_LOCAL))
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="parent", new_session_id="fork"))
        states = {name: server.session(name).state for name in ("idle", "parent", "fork")}
        assert states == {
            "idle": pb.SESSION_STATE_OFFLOADED,
            "parent": pb.SESSION_STATE_READY,
            "fork": pb.SESSION_STATE_READY,
        }


def test_a_parent_that_left_the_device_is_not_forked_without_its_kv(settings: dict[str, object]) -> None:
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(500), session_id="parent", retention=keep(pb.DURABILITY_LOCAL))
        manager = server.server._service.manager  # type: ignore[union-attr]
        parent = manager.get("anonymous", "parent")
        assert manager.make_room(1)
        assert manager.fork(parent, "fork", 0, None) is None
        assert manager.find("anonymous", "fork") is None
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="parent", new_session_id="fork"))
        assert server.session("fork").num_tokens == 500


def test_another_server_finds_a_prompt_s_beginning_in_the_shared_store(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_model), "dtype": "float32", "kv_shared": str(tmp_path / "shared")}
    prompt = tokens_of(700)
    with running_server(**settings) as server:
        first = server.prefill_tokens(prompt, retention=keep(pb.DURABILITY_SHARED))
        assert first.session.durability == pb.DURABILITY_SHARED
    with running_server(**{**settings, "prefix_reuse": True}) as server:
        again = server.prefill_tokens(prompt)
        assert (again.stats.restored_tokens, again.stats.computed_tokens) == (640, 60)
        assert logits(again) == logits(first)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kv_shared": "ftp://somewhere"}, "use a folder, or s3://bucket/prefix"),
        ({"durability": "local"}, "needs kv_disk or kv_shared"),
        ({"durability": "shared", "kv_disk": "/tmp/kv"}, "needs kv_shared"),
    ],
)
def test_settings_of_tiers_that_cannot_be_are_refused(tiny_model: Path, changes: dict[str, str], problem: str) -> None:
    with (
        pytest.raises(ConfigError, match=problem),
        running_server(model=str(tiny_model), dtype="float32", **changes),
    ):
        pass


def test_logits_of_a_life_that_a_crash_ended_are_not_those_of_the_next(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """The record is lost, its blocks are not; the same id and generation then come to other tokens."""
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(300, seed=1), session_id="twice", retention=keep(pb.DURABILITY_LOCAL))
    for record in (tmp_path / "kv" / "records").rglob("*.record"):
        record.unlink()
    with running_server(**settings) as server:
        server.prefill_tokens(tokens_of(300, seed=2), session_id="twice", retention=keep(pb.DURABILITY_LOCAL))
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="twice", new_session_id="fork"))
        expected = server.decode_tokens("fork", 8)
    with running_server(**settings) as server:
        assert server.decode_tokens("twice", 8) == expected
