"""What is measured of kept sessions, on a tiny model: every measurement sees what it is there to see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import kv_kill9, kv_mixed, kv_prefix, kv_restore, kv_session_rows, kv_tenants
from benchmarks.kv_kill9_clients import Known
from benchmarks.kv_tenants import Round
from benchmarks.served import ServedModel
from sale_prefill_client import Client
from tests.support import RunningServer, running_server, tokens_of


def served_by(server: RunningServer, token: str | None = None) -> ServedModel:
    return ServedModel(Client(server.target, token=token), os.getpid(), server.metrics_url)


@pytest.fixture
def served(tiny_model: Path) -> Iterator[ServedModel]:
    with running_server(model=str(tiny_model), dtype="float32", prefix_reuse=True) as server:
        model = served_by(server)
        with model.client:
            yield model


def arguments(model: Path) -> list[str]:
    return ["--model", str(model), "--dtype", "float32", "--threads", "1", "--kv-memory", "64M"]


class TestPrefixes:
    def test_the_second_prompt_takes_the_prefix_and_answers_as_without(self, served: ServedModel) -> None:
        prefixes = [tokens_of(640, seed) for seed in (1, 2)]
        for reuse in kv_prefix.measure_reuse(served, prefixes):
            assert reuse.prefix_tokens == 640
            assert reuse.counted == {"computed": 64, "prefix": 640, "session": 0}
            assert reuse.same_logits
            assert reuse.speedup > 0
        assert list(served.client.list_sessions()) == []

    def test_a_server_without_reuse_falls_short(self, tiny_server: RunningServer) -> None:
        served = served_by(tiny_server)
        with served.client:
            reuses = kv_prefix.measure_reuse(served, [tokens_of(640, seed) for seed in (1, 2)])
        speed, taken, same = kv_session_rows.reuse_rows(reuses, 640)
        assert (speed.passed, taken.passed, same.passed) == (False, False, True)

    def test_forks_and_deletes_of_every_length_are_timed(self, served: ServedModel) -> None:
        times = kv_prefix.measure_forks(served, tokens_of(600), (128, 600), rounds=3)
        assert {tokens: len(seconds) for tokens, seconds in times.fork.items()} == {128: 3, 600: 3}
        assert times.delete.keys() == times.fork.keys()
        assert list(served.client.list_sessions()) == []

    def test_growth_is_the_longest_over_the_shortest(self) -> None:
        times = kv_prefix.ForkTimes({100: [1.0, 2.0, 9.0], 700: [4.0, 4.0, 4.0]}, {100: [1.0], 700: [1.2]})
        assert [row.passed for row in kv_session_rows.fork_rows(times)] == [False, True]


class TestTenants:
    def test_neither_sees_the_other(self, tiny_model: Path, tmp_path: Path) -> None:
        file = tmp_path / "tokens"
        file.write_text("".join(f"{name}:{name}-secret\n" for name in kv_tenants.TENANTS))
        settings = {"model": str(tiny_model), "dtype": "float32", "prefix_reuse": True, "auth_tokens_file": str(file)}
        with running_server(**settings) as server:
            served = {name: served_by(server, f"{name}-secret") for name in kv_tenants.TENANTS}
            rounds = kv_tenants.measure(served, [tokens_of(640, 1), tokens_of(640, 2)])
            for model in served.values():
                model.client.close()
        for each in rounds:
            assert (each.other_reused_tokens, each.other_counted_tokens, each.own_reused_tokens) == (0, 0, 512)

    def test_reuse_between_them_would_show(self) -> None:
        leaky = [Round(1.0, 0.02, 0.02, 640, 640, 640)]
        assert [row.passed for row in kv_session_rows.tenant_rows(leaky)] == [False, True, False]

    def test_only_the_owner_finds_its_prompt_on_disk(self, tiny_model: Path, tmp_path: Path) -> None:
        found = kv_tenants.reused_across_restart(tokens_of(640), tmp_path / "kv", *arguments(tiny_model))
        assert found == (512, 0)


@pytest.mark.slow
def test_everything_is_given_back_after_mixed_sessions() -> None:
    outcome = kv_mixed.measure(sessions=30, threads=3)
    assert outcome.after == outcome.before
    assert outcome.same_answer
    assert sum(outcome.kinds.values()) == 30


def test_sessions_come_back_from_disk(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [tokens_of(700, seed) for seed in (1, 2)]
    found = kv_restore.measure(prompts, tmp_path / "kv", *arguments(tiny_model), answer_tokens=6)
    for each in found:
        assert (each.restored_tokens, each.computed_tokens, each.same_tokens, each.tier) == (700, 0, 6, "disk")
    _, back, same = kv_session_rows.restore_rows(found, 700, 6)
    assert back.passed
    assert same.passed


class TestKills:
    @pytest.mark.slow
    def test_what_was_acknowledged_is_there_after_kills(self) -> None:
        outcome = kv_kill9.measure(3)
        assert outcome.notes == []
        assert outcome.faultless
        assert outcome.checked > 0
        assert len(outcome.ready_seconds) == 4

    def test_what_is_wrong_after_a_restart_is_seen(self, tiny_server: RunningServer) -> None:
        reference, outcome = kv_kill9.Reference(tiny_server.target), kv_kill9.Outcome()
        owner = kv_kill9.Owner("owner", 1, [tokens_of(10)])
        held = tokens_of(50)
        with Client(tiny_server.target) as client:
            for session in client.list_sessions():  # of other tests on the same server
                client.delete_session(session.session_id)
            client.prefill(held, session_id="whole")
            client.prefill(held, session_id="other-tokens")
            client.prefill(held, session_id="back-from-the-dead")
            client.prefill(held, session_id="nobodys")
        owner.sessions = {
            "whole": Known("local", held),
            "other-tokens": Known("local", tokens_of(50, seed=9)),
            "gone": Known("local", held),
            "never-answered": Known("local", possible=[held]),
            "back-from-the-dead": Known("local", held, delete_asked=True, deleted=True),
        }
        kv_kill9.Inspector(reference, outcome).inspect(tiny_server.target, [owner])
        reference.close()
        assert owner.sessions.keys() == {"whole"}
        assert (outcome.checked, outcome.lost, outcome.corrupt) == (3, 1, 1)
        assert (outcome.resurrected, outcome.strangers) == (1, 1)
        with Client(tiny_server.target) as client:
            client.delete_session("whole")
            assert list(client.list_sessions()) == []
