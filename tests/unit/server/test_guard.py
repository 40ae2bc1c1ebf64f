"""The guard: which tiles it looks at, when it calls a head guilty, and what it leaves alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from sale_attention import Audit, LayerPolicy, ModelFingerprint, Profile, SaleConfig, Tile, TileResult
from sale_attention.profile import Geometry, HeadMeasure, HeadSetting, Level
from sale_prefill_server.engine.guard import DEFAULT_EXPECTED_ERROR, Guard, GuardReport, GuardSettings

LAYERS, HEADS = 6, 12
POLICIES = [LayerPolicy.uniform(HEADS)] * LAYERS
QUERY_BLOCK = 64


class Seen(Audit):
    """An audit that found, of each of its tiles, what a function says."""

    def __init__(self, audit: Audit, error: Callable[[Tile], float]) -> None:
        super().__init__(audit.tiles, QUERY_BLOCK)
        self._error = error

    def results(self) -> list[TileResult]:
        return [TileResult(tile, QUERY_BLOCK, 0.9, 0.8, self._error(tile), 0.5) for tile in self.tiles]


def guard_of(
    share: float = 1.0, fall_back: bool = True, profile: Profile | None = None
) -> tuple[Guard, list[GuardReport]]:
    emitted: list[GuardReport] = []
    return Guard(GuardSettings(share, fall_back, seed=1), profile, emitted.append), emitted


def requests(
    guard: Guard,
    count: int,
    error: Callable[[Tile], float],
    *,
    level: int | None = None,
    policies: list[LayerPolicy] = POLICIES,
) -> list[GuardReport]:
    reports = []
    for _ in range(count):
        audit = guard.begin(policies, QUERY_BLOCK, 1024, 8192)
        assert audit is not None
        report = guard.finish(Seen(audit, error), level)
        assert report is not None
        reports.append(report)
    return reports


def profile_of(*heads: tuple[HeadSetting, float]) -> Profile:
    """Each head's setting and the mean error that calibration measured, the same in every layer."""
    settings = tuple(setting for setting, _ in heads)
    measures = tuple(HeadMeasure(0.5, error, 2 * error) for _, error in heads)
    level = Level(0.05, (settings,) * LAYERS, (measures,) * LAYERS, 0.5, 0.05, 0.1, 0.5)
    fingerprint = ModelFingerprint("llama", LAYERS, len(heads), 1, 8, 320, "0" * 64)
    geometry = Geometry.of(SaleConfig())
    return Profile("test", fingerprint, geometry, "budget", {}, torch.zeros(LAYERS, 1, 8), (level,))


def test_every_sampled_request_looks_at_eight_heads_of_every_layer_at_one_of_its_own_sparse_rows() -> None:
    guard, emitted = guard_of()
    (report,) = requests(guard, 1, lambda tile: 0.05)
    by_layer = [[found.tile for found in report.tiles if found.tile.layer == layer] for layer in range(LAYERS)]
    assert [len({tile.head for tile in tiles}) for tiles in by_layer] == [8] * LAYERS
    assert [len({tile.position for tile in tiles}) for tiles in by_layer] == [1] * LAYERS
    assert all(1024 <= found.tile.position < 8192 for found in report.tiles)
    assert emitted == [report]


def test_heads_and_rows_vary() -> None:
    guard, _ = guard_of()
    tiles = {found.tile for report in requests(guard, 20, lambda tile: 0.05) for found in report.tiles}
    assert {tile.head for tile in tiles if tile.layer == 0} == set(range(HEADS))
    assert len({tile.position // QUERY_BLOCK for tile in tiles}) > 50


def test_the_share_of_requests_is_the_one_asked_for() -> None:
    guard, _ = guard_of(share=0.1)
    sampled = sum(guard.begin(POLICIES, QUERY_BLOCK, 1024, 8192) is not None for _ in range(2000))
    assert 150 <= sampled <= 250
    assert guard_of(share=0.0)[0].begin(POLICIES, QUERY_BLOCK, 1024, 8192) is None


def test_requests_without_sparse_rows_and_dense_heads_are_left_alone() -> None:
    guard, _ = guard_of()
    assert guard.begin(POLICIES, QUERY_BLOCK, 8192, 8192) is None
    dense = LayerPolicy.uniform(4, 0.0)
    assert guard.begin([dense] * LAYERS, QUERY_BLOCK, 1024, 8192) is None
    mixed = LayerPolicy(torch.tensor([0.0, 0.004, math.inf, 0.0]), torch.ones(4, dtype=torch.int64))
    audit = guard.begin([dense, mixed], QUERY_BLOCK, 1024, 8192)
    assert audit is not None
    assert {(tile.layer, tile.head) for tile in audit.tiles} == {(1, 1), (1, 2)}


def test_a_layer_that_loses_six_times_too_much_is_found_and_its_heads_go_dense() -> None:
    guard, _ = guard_of()
    reports = requests(guard, 10, lambda tile: (6 if tile.layer == 3 else 1) * DEFAULT_EXPECTED_ERROR)
    assert guard.suspect_layers == {3}
    assert guard.dense_heads == {(3, head) for head in range(HEADS)}
    first = next(index for index, report in enumerate(reports) if report.alerts)
    assert first <= 3
    alert = reports[first].alerts[0]
    assert (alert.layer, alert.head, alert.dense) == (3, None, False)
    assert alert.mean_error == pytest.approx(6 * DEFAULT_EXPECTED_ERROR)
    adjusted = guard.adjusted(POLICIES)
    assert [policy.tau.tolist() == [0.0] * HEADS for policy in adjusted] == [layer == 3 for layer in range(LAYERS)]
    assert adjusted[0] is POLICIES[0]
    audit = guard.begin(adjusted, QUERY_BLOCK, 1024, 8192)
    assert audit is not None
    assert 3 not in {tile.layer for tile in audit.tiles}


def test_a_head_is_accused_once() -> None:
    guard, emitted = guard_of()
    requests(guard, 30, lambda tile: 1.0)
    accused = [(alert.layer, alert.head) for report in emitted for alert in report.alerts]
    assert len(accused) == len(set(accused)) == LAYERS * (HEADS + 1)


def test_one_head_that_loses_ten_times_too_much_is_found_without_its_layer() -> None:
    guard, _ = guard_of()
    requests(guard, 40, lambda tile: (10 if (tile.layer, tile.head) == (2, 1) else 1) * DEFAULT_EXPECTED_ERROR)
    assert guard.suspect_layers == frozenset()
    assert guard.dense_heads == {(2, 1)}


def test_a_streaming_head_answers_for_itself_alone() -> None:
    profile = profile_of((HeadSetting("sparse", 0.004), 0.02), (HeadSetting("streaming"), 0.02))
    policies = profile.policies()
    guard, _ = guard_of(profile=profile)
    requests(guard, 40, lambda tile: 0.2 if tile.head == 1 else 0.02, level=0, policies=policies)
    assert guard.suspect_layers == frozenset()
    assert guard.dense_heads == {(layer, 1) for layer in range(LAYERS)}


def test_what_is_too_much_is_relative_to_what_the_profile_measured() -> None:
    profile = profile_of((HeadSetting("sparse", 0.004), 0.02), (HeadSetting("sparse", 0.1), 0.4))
    measured, found = (0.02, 0.4), (0.16, 0.4)
    guard, _ = guard_of(profile=profile)
    requests(guard, 100, lambda tile: measured[tile.head], level=0, policies=profile.policies())
    assert not guard.guilty_heads
    requests(guard, 20, lambda tile: found[tile.head], level=0, policies=profile.policies())
    assert guard.guilty_heads == {(layer, 0) for layer in range(LAYERS)}


def test_alerts_alone_change_nothing() -> None:
    guard, emitted = guard_of(fall_back=False)
    requests(guard, 10, lambda tile: 0.6)
    assert guard.suspect_layers == set(range(LAYERS))
    assert guard.guilty_heads
    assert not guard.dense_heads
    assert guard.adjusted(POLICIES) == POLICIES
    assert all(not alert.dense for report in emitted for alert in report.alerts)


@pytest.mark.parametrize("hardness", [1.0, 2.0])
def test_text_twice_as_hard_with_outliers_never_adds_up(hardness: float) -> None:
    guard, emitted = guard_of()
    noise = random.Random(5)

    def error(tile: Tile) -> float:
        return hardness * DEFAULT_EXPECTED_ERROR * math.exp(noise.gauss(-0.125, 0.5))

    requests(guard, 1000, error)
    assert not [alert for report in emitted for alert in report.alerts]


def test_losing_nothing_is_no_fault() -> None:
    guard, _ = guard_of()
    requests(guard, 20, lambda tile: 0.0)
    assert not guard.suspect_layers
    free = profile_of((HeadSetting("sparse", 0.004), 0.0))
    guard, _ = guard_of(profile=free)
    requests(guard, 20, lambda tile: 0.004, level=0, policies=free.policies())
    assert not guard.suspect_layers


def test_sessions_may_open_while_a_request_is_judged() -> None:
    guard, _ = guard_of()
    before = guard.dense_heads
    requests(guard, 10, lambda tile: 0.6)
    assert before == frozenset()
    assert guard.dense_heads is not before
