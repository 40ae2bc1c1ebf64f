"""Where sparse rows start: a pure function of a table of measured costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sale_attention import SaleConfig
from sale_attention.crossover import (
    NEVER,
    AttentionCosts,
    costs_of,
    crossover_position,
    expected_density,
    longest_dense_prompt,
)

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


@pytest.mark.parametrize("backend", ["cpu-avx512", "cpu-avx512_vnni", "cpu-avx2"])
def test_native_kernels_turn_sparse_before_a_short_prompt_is_long(backend: str) -> None:
    for head_dim in (64, 128):
        assert 1024 <= crossover(costs_of(backend, head_dim)) <= 4096


def dense_prompt(costs: AttentionCosts, heads: int, stride: int = 2) -> int:
    return longest_dense_prompt(costs, [(0.004, stride)] * heads, 1, crossover(costs, stride=stride))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_on_a_gpu_a_prompt_of_4k_is_dense_and_one_of_8k_is_not(stride: int) -> None:
    assert 4096 <= dense_prompt(costs_of("cuda-sm90a", 128), heads=32, stride=stride) < 8192


def test_a_longer_prompt_saves_what_the_sparse_passes_cost_at_the_least() -> None:
    costs = replace(COSTS, call_seconds=1e-3)
    rows, tokens = crossover(costs, stride=2), dense_prompt(costs, heads=8)

    def saved(end: int) -> float:
        each = (row * costs.dense_pair_seconds - costs.sparse_row_seconds(row, 0.004, 2) for row in range(rows, end))
        return 8 * sum(each)

    assert saved(tokens - 128) < 1e-3 <= saved(tokens) * 1.001
    assert dense_prompt(costs, heads=32) < tokens


def test_without_fixed_costs_no_prompt_is_dense_for_its_length() -> None:
    assert dense_prompt(COSTS, heads=8) == 0
    assert dense_prompt(costs_of("cpu-avx512", 64), heads=9) == 0


def test_a_backend_that_nobody_measured_counts_as_the_reference() -> None:
    assert costs_of("npu", 64) == costs_of("reference", 64)
    assert crossover(costs_of("reference", 64)) > 2048


def test_a_gpu_that_nobody_measured_counts_as_the_one_that_was() -> None:
    assert costs_of("cuda-sm89", 128) == costs_of("cuda-sm90a", 128)


def test_on_a_gpu_the_reference_never_computes_sparse_rows() -> None:
    assert crossover(costs_of("reference", 96, "cuda")) == NEVER


def test_costs_scale_from_the_nearest_measured_head_dim() -> None:
    assert costs_of("cpu-avx512", 256).dense_pair_seconds == 2 * costs_of("cpu-avx512", 128).dense_pair_seconds
