"""Where sparse rows start: a pure function of measured costs, and costs that a machine measures once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sale_attention import SaleConfig, get_backend
from sale_attention.crossover import AttentionCosts, crossover_position, expected_density, measured_costs

# An H100-like machine, roughly: estimation at twice the rate of dense attention's products.
COSTS = AttentionCosts(
    dense_pair_seconds=1e-9, estimate_pair_seconds=0.2e-9, compute_pair_seconds=1e-9, row_seconds=200e-9
)


def crossover(costs: AttentionCosts = COSTS, tau: float = 0.004, stride: int = 1) -> int:
    return crossover_position(costs, tau, stride, SaleConfig())


def test_past_the_crossover_sparse_rows_are_cheaper_and_before_it_they_are_not() -> None:
    position = crossover()
    assert position % 128 == 0
    assert position > SaleConfig().dense_rows
    assert COSTS.sparse_row_seconds(position, 0.004, 1) < position * COSTS.dense_pair_seconds
    before = position - 128
    assert COSTS.sparse_row_seconds(before, 0.004, 1) >= before * COSTS.dense_pair_seconds


def test_cheaper_estimation_and_a_larger_threshold_bring_it_forward() -> None:
    assert crossover(stride=4) < crossover(stride=1)
    assert crossover(tau=0.008) < crossover(tau=0.004) < crossover(tau=0.001)
    assert crossover(replace(COSTS, row_seconds=2e-6)) > crossover()


def test_it_never_comes_before_the_key_centre_is_known() -> None:
    free = replace(COSTS, estimate_pair_seconds=0.0, row_seconds=0.0, compute_pair_seconds=0.0)
    assert crossover(free) == SaleConfig().dense_rows


def test_where_estimation_costs_more_than_attention_everything_stays_dense() -> None:
    assert crossover(replace(COSTS, estimate_pair_seconds=2e-9)) >= 1 << 20


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_expected_density_falls_with_position_and_threshold(stride: int) -> None:
    shares = [expected_density(position, 0.004, stride) for position in (64, 2048, 8192, 32768)]
    assert shares[0] == 1.0 or stride > 1
    assert shares == sorted(shares, reverse=True)
    assert expected_density(8192, 0.008, stride) < expected_density(8192, 0.004, stride)


def measure(heads: int = 2) -> AttentionCosts:
    return measured_costs(
        get_backend("cpu"),
        heads=heads,
        kv_heads=1,
        head_dim=64,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        config=SaleConfig(),
    )


def test_costs_are_measured_once_per_machine_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path))
    get_backend("cpu").description  # noqa: B018 - kernels are built before the cache is watched
    costs = measure()
    assert all(0 < seconds < 1e-3 for seconds in vars_of(costs))
    (file,) = (tmp_path / "costs").iterdir()
    assert measure() == costs
    assert json.loads(file.read_text())["costs"]["row_seconds"] == costs.row_seconds
    measure(heads=3)
    assert len(list((tmp_path / "costs").iterdir())) == 2


def test_a_spoiled_cache_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path))
    measure()
    (file,) = (tmp_path / "costs").iterdir()
    file.write_text('{"costs": {"dense_pair_')
    costs = measure()
    assert json.loads(file.read_text())["costs"]["dense_pair_seconds"] == costs.dense_pair_seconds


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    assert measure().dense_pair_seconds > 0


def vars_of(costs: AttentionCosts) -> list[float]:
    return [
        costs.dense_pair_seconds,
        costs.estimate_pair_seconds,
        costs.compute_pair_seconds,
        costs.row_seconds,
    ]
