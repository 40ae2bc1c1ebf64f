"""The guard: which tiles it looks at, when it calls a head guilty, and what it leaves alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from sale_attention import Audit, LayerPolicy, Tile, TileResult
from sale_prefill_server.engine.guard import DEFAULT_EXPECTED_ERROR, Guard, GuardReport, GuardSettings

LAYERS, HEADS = 6, 4
POLICIES = [LayerPolicy.uniform(HEADS)] * LAYERS


class Seen(Audit):
    """An audit that found, of each of its tiles, what a function says."""

    def __init__(self, audit: Audit, error: Callable[[Tile], float]) -> None:
        super().__init__([tile for tiles in audit._waiting.values() for tile in tiles], 64)
        self._error = error

    @property
    def tiles(self) -> list[Tile]:
        return [tile for tiles in self._waiting.values() for tile in tiles]

    def results(self) -> list[TileResult]:
        return [TileResult(tile, 64, 0.9, 0.8, self._error(tile), 0.5) for tile in self.tiles]


def guard_of(share: float = 1.0, fall_back: bool = True) -> tuple[Guard, list[GuardReport]]:
    emitted: list[GuardReport] = []
    return Guard(GuardSettings(share, fall_back, seed=1), None, emitted.append), emitted


def requests(guard: Guard, count: int, error: Callable[[Tile], float]) -> list[GuardReport]:
    reports = []
    for _ in range(count):
        audit = guard.begin(POLICIES, 64, 1024, 8192)
        assert audit is not None
        report = guard.finish(Seen(audit, error), None)
        assert report is not None
        reports.append(report)
    return reports


def test_every_sampled_request_looks_at_every_layer_once_among_its_own_sparse_rows() -> None:
    guard, emitted = guard_of()
    (report,) = requests(guard, 1, lambda tile: 0.05)
    assert [found.tile.layer for found in report.tiles] == list(range(LAYERS))
    assert all(1024 <= found.tile.position < 8192 for found in report.tiles)
    assert emitted == [report]


def test_heads_and_rows_vary() -> None:
    guard, _ = guard_of()
    tiles = {found.tile for report in requests(guard, 20, lambda tile: 0.05) for found in report.tiles}
    assert {tile.head for tile in tiles if tile.layer == 0} == set(range(HEADS))
    assert len({tile.position // 64 for tile in tiles}) > 50


def test_the_share_of_requests_is_the_one_asked_for() -> None:
    guard, _ = guard_of(share=0.1)
    sampled = sum(guard.begin(POLICIES, 64, 1024, 8192) is not None for _ in range(2000))
    assert 150 <= sampled <= 250
    assert guard_of(share=0.0)[0].begin(POLICIES, 64, 1024, 8192) is None


def test_requests_without_sparse_rows_or_heads_are_left_alone() -> None:
    guard, _ = guard_of()
    assert guard.begin(POLICIES, 64, 8192, 8192) is None
    no_sparse = LayerPolicy(torch.tensor([0.0, math.inf] * 2), torch.ones(HEADS, dtype=torch.int64))
    assert guard.begin([no_sparse] * LAYERS, 64, 1024, 8192) is None
    mixed = LayerPolicy(torch.tensor([0.0, 0.004, math.inf, 0.0]), torch.ones(HEADS, dtype=torch.int64))
    audit = guard.begin([no_sparse, mixed], 64, 1024, 8192)
    assert audit is not None
    assert [(tile.layer, tile.head) for tiles in audit._waiting.values() for tile in tiles] == [(1, 1)]


def test_a_layer_that_loses_eight_times_too_much_is_found_and_its_heads_go_dense() -> None:
    guard, _ = guard_of()
    reports = requests(guard, 10, lambda tile: (8 if tile.layer == 3 else 1) * DEFAULT_EXPECTED_ERROR)
    assert guard.suspect_layers == {3}
    assert guard.dense_heads == {(3, head) for head in range(HEADS)}
    first = next(index for index, report in enumerate(reports) if report.alerts)
    assert first <= 3
    assert reports[first].alerts[0].head is None
    adjusted = guard.adjusted(POLICIES)
    assert [policy.tau.tolist() == [0.0] * HEADS for policy in adjusted] == [layer == 3 for layer in range(LAYERS)]
    assert guard.begin(adjusted, 64, 1024, 8192) is not None


def test_one_guilty_head_goes_and_its_neighbours_stay() -> None:
    guard, _ = guard_of()
    requests(guard, 60, lambda tile: (8 if (tile.layer, tile.head) == (2, 1) else 1) * DEFAULT_EXPECTED_ERROR)
    assert guard.dense_heads <= {(2, 1)}


def test_alerts_alone_change_nothing() -> None:
    guard, emitted = guard_of(fall_back=False)
    requests(guard, 10, lambda tile: 0.6)
    assert guard.suspect_layers == set(range(LAYERS))
    assert not guard.dense_heads
    assert guard.adjusted(POLICIES) == POLICIES
    assert all(not alert.dense for report in emitted for alert in report.alerts)


@pytest.mark.parametrize("level", [1.0, 2.0])
def test_text_twice_as_hard_with_outliers_never_adds_up(level: float) -> None:
    guard, emitted = guard_of()
    noise = random.Random(5)

    def error(tile: Tile) -> float:
        return level * DEFAULT_EXPECTED_ERROR * math.exp(noise.gauss(-0.125, 0.5))

    requests(guard, 1000, error)
    assert not [alert for report in emitted for alert in report.alerts]


def test_losing_nothing_is_no_fault_and_a_broken_tile_is() -> None:
    guard, _ = guard_of()
    requests(guard, 5, lambda tile: 0.0)
    assert not guard.suspect_layers
    requests(guard, 5, lambda tile: math.nan if tile.layer == 0 else 0.0)
    assert guard.suspect_layers == {0}
