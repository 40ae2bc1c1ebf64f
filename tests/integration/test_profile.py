"""A profile through the service: served, chosen by error budget, reported, refused; and the guard that watches it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sale_attention import ModelFingerprint, Profile, SaleConfig, save_profile
from sale_attention.profile import Geometry, HeadMeasure, HeadSetting, Level
from sale_prefill.v1 import session_service_pb2
from sale_prefill_client import Attention, Client
from sale_prefill_server.config import ConfigError, ServerConfig
from tests.support import RunningServer, call_error, running_server, tokens_of

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
#: Of the profile that comes with the package.
LEVELS = (0.00025, 0.0005, 0.001, 0.002, 0.004)


def level(budget: float, tau: float, error: float) -> Level:
    heads = (HeadSetting("sparse", tau, 2), HeadSetting("streaming"), HeadSetting("dense"), HeadSetting("sparse", tau))
    measures = (HeadMeasure(0.5, error, 2 * error),) * HEADS
    return Level(budget, (heads,) * LAYERS, (measures,) * LAYERS, 0.5, error, 2 * error, 0.5)


@pytest.fixture(scope="module")
def profile(tiny_model: Path) -> Profile:
    module = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return Profile(
        name="tiny",
        fingerprint=ModelFingerprint.of(module),
        geometry=Geometry.of(SaleConfig()),
        method="budget",
        text={},
        key_centres=torch.zeros(LAYERS, KV_HEADS, DIM),
        levels=(level(0.01, 1e-4, 0.9), level(0.05, 0.5, 0.9)),
        default_level=1,
    )


def serving(profile: Profile, model: Path, folder: Path, **settings: Any) -> Any:
    save_profile(profile, folder / "profile.json")
    fixed = {"model": str(model), "dtype": "float32", "chunk_tokens": 512, "profile": str(folder / "profile.json")}
    return running_server(**{**fixed, **settings})


@pytest.fixture(scope="module")
def server(profile: Profile, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(profile, tiny_model, tmp_path_factory.mktemp("profile"), guard_share=1.0) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_a_request_that_asks_for_nothing_gets_the_default_level(client: Client, profile: Profile) -> None:
    stats = client.prefill(tokens_of(2000)).stats
    assert stats.profile is not None
    assert (stats.profile.name, stats.profile.digest) == ("tiny", profile.digest)
    assert stats.profile.error_budget == 0.05
    assert stats.profile.expected_error == 0.9
    strategies = (stats.profile.sparse_heads, stats.profile.streaming_heads, stats.profile.dense_heads)
    assert strategies == (2 * LAYERS, LAYERS, LAYERS)
    densities = stats.layers[0].head_densities
    assert densities[2] == 1.0
    assert densities[1] <= densities[0] < 1.0


@pytest.mark.parametrize(("budget", "used"), [(0.02, 0.01), (0.05, 0.05), (3.0, 0.05)])
def test_a_request_gets_the_largest_level_within_its_budget(client: Client, budget: float, used: float) -> None:
    stats = client.prefill(tokens_of(2000), attention=Attention.within(budget)).stats
    assert stats.profile is not None
    assert stats.profile.error_budget == used
    assert stats.density < 1.0


def test_a_budget_below_the_least_level_is_met_by_dense_attention(client: Client) -> None:
    stats = client.prefill(tokens_of(2000), attention=Attention.within(0.001)).stats
    assert stats.density == 1.0
    assert stats.profile is not None
    assert (stats.profile.error_budget, stats.profile.dense_heads) == (0.0, LAYERS * HEADS)
    assert stats.guard is None


def test_a_threshold_of_the_callers_or_dense_attention_is_not_the_profiles(client: Client) -> None:
    for attention in (Attention.sale(0.004), Attention.sale(query_stride=2), Attention.dense()):
        assert client.prefill(tokens_of(1500), attention=attention).stats.profile is None


def test_the_server_says_what_it_has(client: Client, profile: Profile) -> None:
    info = client.get_server_info()
    assert info.profile is not None
    assert (info.profile.name, info.profile.error_budgets) == ("tiny", (0.01, 0.05))
    assert info.default_attention == Attention("sale", error_budget=0.05)


def test_the_default_model_comes_with_a_profile() -> None:
    with running_server(model=ServerConfig.model, kv_memory="1G") as server, Client(server.target) as client:
        info = client.get_server_info()
        assert info.profile is not None
        assert (info.profile.name, info.profile.error_budgets) == ("smollm2-135m-instruct", LEVELS)
        assert info.default_attention == Attention("sale", error_budget=0.001)
        stats = client.prefill(tokens_of(1500)).stats
        assert stats.profile is not None
        assert (stats.profile.digest, stats.profile.error_budget) == (info.profile.digest, 0.001)


def test_an_append_keeps_the_sessions_budget(client: Client) -> None:
    session = client.prefill(tokens_of(1500), attention=Attention.within(0.01)).session_id
    appended = client.prefill(tokens_of(500), session_id=session, attention=Attention.within(0.01))
    assert appended.stats.profile is not None
    assert appended.stats.profile.error_budget == 0.01
    assert appended.session.attention == Attention("sale", error_budget=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_budget": 0.0}, "0.0: must be above 0"),
        ({"error_budget": float("nan")}, "nan: must be above 0"),
        ({"error_budget": 0.1, "threshold": 0.1}, "leave these out, or this"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(
    server: RunningServer, options: dict[str, float], message: str
) -> None:
    asked = session_service_pb2.AttentionOptions(**options)
    error = call_error(lambda: server.prefill_tokens(tokens_of(10), attention=asked))
    assert (error.reason, error.fields) == ("INVALID_FIELD", ["attention.error_budget"])
    assert message in error.message


def test_without_a_profile_a_budget_is_refused_with_the_way_out(tiny_server: RunningServer) -> None:
    asked = session_service_pb2.AttentionOptions(error_budget=0.1)
    error = call_error(lambda: tiny_server.prefill_tokens(tokens_of(10), attention=asked))
    assert "--profile FILE (sale-prefill calibrate writes one)" in error.message


def test_the_guard_reports_what_it_saw(client: Client, server: RunningServer) -> None:
    stats = client.prefill(tokens_of(2000)).stats
    assert stats.guard is not None
    assert stats.guard.num_tiles == LAYERS * 3  # all heads that are not dense
    assert 0.0 < stats.guard.kept_mass <= 1.0
    assert 0.0 < stats.guard.mean_error <= stats.guard.max_error
    assert stats.guard.alerts == ()
    page = urllib.request.urlopen(server.metrics_url).read().decode()
    assert "sale_prefill_guard_kept_mass_ratio_count" in page
    assert 'sale_prefill_guard_alerts_total{layer="1"} 0.0' in page


def test_a_threshold_of_the_callers_is_not_the_guards_business(client: Client) -> None:
    for _ in range(4):
        assert client.prefill(tokens_of(1500), attention=Attention.sale(1.0)).stats.guard is None
    assert client.prefill(tokens_of(1500)).stats.guard is not None


def test_a_profile_that_promises_too_much_is_found_and_its_heads_go_dense(
    profile: Profile, tiny_model: Path, tmp_path: Path
) -> None:
    promises = replace(profile, levels=(level(0.05, 0.9, 0.001),), default_level=0)
    with serving(promises, tiny_model, tmp_path, guard_share=1.0) as server, Client(server.target) as client:
        looks = [client.prefill(tokens_of(1500)).stats.guard for _ in range(8)]
        alerts = [alert for seen in looks if seen is not None for alert in seen.alerts]
        last = client.prefill(tokens_of(1500)).stats.profile
        page = urllib.request.urlopen(server.metrics_url).read().decode()
    fallen = {(alert.layer, alert.head) for alert in alerts if alert.dense}
    assert fallen
    assert last is not None
    assert last.dense_heads == LAYERS + len(fallen)
    total = sum(
        float(line.split()[-1])
        for line in page.splitlines()
        if line.startswith("sale_prefill_guard_dense_fallbacks_to")
    )
    assert total == len(fallen)


def test_a_profile_of_another_model_stops_the_start(profile: Profile, tiny_model: Path, tmp_path: Path) -> None:
    other = replace(profile, fingerprint=replace(profile.fingerprint, weights="0" * 64))
    with (
        pytest.raises(ConfigError, match=r"profile = .*belongs to another model: weights 0+, not .*calibrate"),
        serving(other, tiny_model, tmp_path),
    ):
        pass


def test_blocks_are_those_that_the_profile_was_calibrated_with(
    profile: Profile, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    wide = replace(profile, geometry=Geometry(128, 32, 32, 512, 8, 0))
    with serving(profile, tiny_model, tmp_path) as narrow, Client(narrow.target) as client:
        few = client.prefill(tokens_of(3000)).stats.layers[0].head_densities[1]
        assert "lose" not in caplog.text
    with serving(wide, tiny_model, tmp_path) as server, Client(server.target) as client:
        many = client.prefill(tokens_of(3000)).stats.layers[0].head_densities[1]
    assert many > few  # of the streaming head, which attends to its window
    assert "query blocks of 64, calibrated with 128: they keep less" in caplog.text


@pytest.mark.parametrize(("asked", "why"), [("auto", "of this model"), ("none", "is asked for")])
def test_without_a_profile_the_log_says_why_and_what_heads_do(
    asked: str, why: str, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with running_server(model=str(tiny_model), dtype="float32", profile=asked):
        pass
    said = f"no profile {why} (profile = {asked!r}): sale attention, threshold 0.004, query_stride 1 by default"
    assert caplog.text.count(said) == 1


def test_a_profile_and_a_threshold_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say one"):
        ServerConfig(profile=str(tmp_path / "profile.json"), threshold=0.01)
    assert ServerConfig().wants_shipped_profile
    assert not ServerConfig(query_stride=2).wants_shipped_profile
    assert not ServerConfig(profile="none").wants_shipped_profile
