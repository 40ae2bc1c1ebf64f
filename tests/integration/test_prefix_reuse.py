"""Prompts that begin the same: computed once a tenant, exact, never across tenants; forks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sale_prefill.v1 import prefill_service_pb2 as prefill_pb
from sale_prefill.v1 import session_service_pb2 as pb
from tests.support import RunningServer, running_server, tokens_of


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(model=str(tiny_model), dtype="float32", prefix_reuse=True, chunk_tokens=512) as server:
        yield server


def logits(result: prefill_pb.PrefillResult) -> list[tuple[int, float]]:
    return [(item.token_id, item.logit) for item in result.top_logits]


def computed(result: prefill_pb.PrefillResult) -> tuple[int, int, int]:
    stats = result.stats
    return stats.computed_tokens, stats.cached_tokens, stats.prefix_tokens


def test_a_prompt_computes_only_what_no_session_holds(server: RunningServer) -> None:
    prefix = tokens_of(1300, seed=1)
    server.prefill_tokens(prefix, session_id="first")
    again = server.prefill_tokens(prefix + tokens_of(60, seed=2))
    assert computed(again) == (1360 - 1280, 1280, 1280)
    alone = server.prefill_tokens(prefix + tokens_of(60, seed=2), prefix_reuse=prefill_pb.PREFIX_REUSE_OFF)
    assert computed(alone) == (1360, 0, 0)
    assert logits(again) == logits(alone)


def test_the_same_prompt_computes_its_last_page_alone(server: RunningServer) -> None:
    prompt = tokens_of(1280, seed=3)
    first = server.prefill_tokens(prompt)
    again = server.prefill_tokens(prompt)
    assert computed(again) == (128, 1152, 1152)
    assert logits(again) == logits(first)


def test_a_short_prefix_counts_too(server: RunningServer) -> None:
    prompt = tokens_of(300, seed=4)
    server.prefill_tokens(prompt)
    again = server.prefill_tokens(prompt[:256] + tokens_of(2000, seed=5))
    alone = server.prefill_tokens(prompt[:256] + tokens_of(2000, seed=5), prefix_reuse=prefill_pb.PREFIX_REUSE_OFF)
    assert computed(again) == (2000, 256, 256)
    assert logits(again) == logits(alone)


def test_other_attention_settings_share_nothing(server: RunningServer) -> None:
    prompt = tokens_of(400, seed=6)
    server.prefill_tokens(prompt)
    dense = pb.AttentionOptions(mode=pb.ATTENTION_MODE_DENSE)
    assert computed(server.prefill_tokens(prompt, attention=dense)) == (400, 0, 0)
    assert computed(server.prefill_tokens(prompt, attention=dense)) == (16, 384, 384)


def test_what_was_deleted_is_gone_and_what_expired_serves_until_its_room_is_needed(server: RunningServer) -> None:
    for name, reused in (("deleted", 0), ("released", 384)):
        prompt = tokens_of(400, seed=len(name))
        policy = pb.RetentionPolicy()
        policy.lease_duration.FromSeconds(0 if name == "released" else 60)
        server.prefill_tokens(prompt, session_id=name, retention=policy)
        if name == "deleted":
            server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id=name))
        assert computed(server.prefill_tokens(prompt)) == (400 - reused, reused, reused)


def test_tokens_by_source_are_counted(server: RunningServer) -> None:
    before = server.metric("sale_prefill_tokens_total", source="prefix")
    server.prefill_tokens(tokens_of(400, seed=9))
    server.prefill_tokens(tokens_of(400, seed=9))
    assert server.metric("sale_prefill_tokens_total", source="prefix") == before + 384


def test_a_fork_goes_on_from_any_token_and_leaves_its_parent_alone(server: RunningServer) -> None:
    prompt = tokens_of(1500, seed=10)
    server.prefill_tokens(prompt, session_id="parent", labels={"document": "7"})
    used = server.load().kv_used_bytes
    response = server.sessions.ForkSession(
        pb.ForkSessionRequest(session_id="parent", new_session_id="child", num_tokens=1400)
    )
    page_bytes = server.session("parent").size_bytes // 12
    assert server.load().kv_used_bytes - used == page_bytes
    assert (response.session.num_tokens, dict(response.session.labels)) == (1400, {"document": "7"})
    grown = server.prefill_tokens(tokens_of(100, seed=11), session_id="child")
    alone = server.prefill_tokens(prompt[:1400] + tokens_of(100, seed=11), prefix_reuse=prefill_pb.PREFIX_REUSE_OFF)
    assert [token for token, _ in logits(grown)] == [token for token, _ in logits(alone)]
    assert server.session("parent").num_tokens == 1500
    server.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="parent"))
    assert server.session("child").num_tokens == 1500


def test_a_fork_decodes_what_its_parent_would(server: RunningServer) -> None:
    prompt = tokens_of(256, seed=12)
    server.prefill_tokens(prompt, session_id="told")
    for name, count in (("whole", 0), ("cut", 200)):
        server.sessions.ForkSession(pb.ForkSessionRequest(session_id="told", new_session_id=name, num_tokens=count))
    answers = {name: server.decode_tokens(name, 8) for name in ("told", "whole", "cut")}
    server.prefill_tokens(prompt[:200], session_id="reference", prefix_reuse=prefill_pb.PREFIX_REUSE_OFF)
    assert answers["whole"] == answers["told"]
    assert answers["cut"] == server.decode_tokens("reference", 8)


def test_two_tenants_with_equal_prompts_share_nothing(tiny_model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red:red-secret\nblue:blue-secret\n")
    prompt = tokens_of(400, seed=13)
    with running_server(
        model=str(tiny_model), dtype="float32", prefix_reuse=True, auth_tokens_file=str(tokens)
    ) as server:
        results = {
            name: [computed(server.prefill_tokens(prompt, token=f"{name}-secret")) for _ in range(2)]
            for name in ("red", "blue")
        }
    assert results["red"] == results["blue"] == [(400, 0, 0), (16, 384, 384)]
