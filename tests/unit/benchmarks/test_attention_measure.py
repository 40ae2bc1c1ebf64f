"""Baseline and candidates are timed in turns, the fastest dense call is the baseline, rows say what was measured."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from benchmarks import attention_measure
from benchmarks.attention_floor import Ceilings
from benchmarks.attention_measure import (
    DenseBaseline,
    Setting,
    Spread,
    dense_calls,
    describe_backend,
    interleave,
    l1_error,
    measure,
    rounds_within,
    sale_config,
)
from benchmarks.attention_traces import Trace
from sale_attention import AttentionStatistics, SaleConfig
from sale_attention.crossover import AttentionCosts, crossover_position

CPU = torch.device("cpu")
CEILINGS = Ceilings(bf16_flops=1e11, int8_ops=2e11, copy_bytes=1e10, workers=1)
DENSE_ROWS = 128


def random_trace(tokens: int = 512, heads: int = 3, head_dim: int = 16) -> Trace:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, count, tokens, head_dim, generator=generator).to(torch.bfloat16) for count in (heads, 1, 1)
    )
    return Trace("random", "none", query, keys, values, head_dim**-0.5)


def test_calls_take_turns_and_every_other_round_runs_backwards() -> None:
    order: list[str] = []

    def call(name: str) -> attention_measure.Call:
        def record() -> tuple[Tensor, AttentionStatistics | None]:
            order.append(name)
            return torch.empty(0), None

        return record

    rounds: list[tuple[int, int]] = []
    names = ("dense", "one", "two")
    samples = interleave({name: call(name) for name in names}, 3, CPU, lambda done, total: rounds.append((done, total)))
    assert order == ["dense", "one", "two", "two", "one", "dense", "dense", "one", "two"]
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys(names, 3)
    assert rounds == [(1, 3), (2, 3), (3, 3)]


def test_rounds_fit_the_budget_within_limits() -> None:
    assert rounds_within(30, 3) == 10
    assert rounds_within(30, 1e-9) == attention_measure.MAX_ROUNDS
    assert rounds_within(30, 60) == attention_measure.MIN_ROUNDS


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_l1_error_is_relative_to_the_reference() -> None:
    reference = torch.tensor([[[[1.0, -3.0]], [[2.0, 2.0]]]])
    assert l1_error(reference + 0.5, reference) == pytest.approx(4 * 0.5 / 8)


def test_every_way_to_call_sdpa_gives_the_same_attention() -> None:
    outputs = {name: call().float() for name, call in dense_calls(random_trace()).items()}
    assert len(outputs) >= 3
    first = next(iter(outputs.values()))
    for output in outputs.values():
        torch.testing.assert_close(output, first, atol=2e-2, rtol=0)


def test_the_fastest_dense_call_is_found_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"sale_attention.dense": 3.0, "enable_gqa": 1.0, "repeated keys and values": 2.0}

    def scripted(calls: dict[str, object], rounds: int, device: torch.device) -> object:
        return {name: [attention_measure.Sample(seconds[name], {})] * rounds for name in calls}

    monkeypatch.setattr(attention_measure, "interleave", scripted)
    baseline = DenseBaseline()
    assert baseline.name(random_trace(256)) == baseline.name(random_trace(256)) == "enable_gqa"
    assert [found["seconds"] for found in baseline.found] == [seconds]


def test_rows_of_a_trace() -> None:
    trace = random_trace()
    settings = [Setting("reference", stride, 0.3, DENSE_ROWS) for stride in (1, 2)]
    rows = measure(trace, settings, CEILINGS, DenseBaseline(), rounds=3)
    assert [row.setting for row in rows] == settings
    for row in rows:
        assert (row.tokens, row.heads, row.head_dim, row.rounds, row.runs_on) == (512, 3, 16, 3, "reference")
        assert row.short_rows == DENSE_ROWS
        assert sum(row.phase_seconds.values()) <= row.seconds.high
        assert all(row.phase_seconds[phase] > 0 for phase in ("quantise", "sink_local", "select", "compute", "dense"))
        assert row.dense_shares["select"] > 0
        assert 0 < row.density < 1
        assert 0 < row.l1_error < 1
        assert row.execution_gflops is not None
        assert 0 < row.floor.total < row.floor.dense + row.floor.estimation
    json.dumps([dataclasses.asdict(row) for row in rows])


def test_rows_turn_sparse_where_told_or_where_it_is_expected_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = AttentionCosts(1.0, 0.1, 0.5, row_seconds=1500.0)
    monkeypatch.setattr(attention_measure, "costs_of", lambda *args, **named: costs)
    told = sale_config(random_trace(), Setting("reference", 1, 0.004, 256))
    assert (told.dense_rows, told.centre_tokens) == (256, 256)
    found = sale_config(random_trace(), Setting("reference", 1, 0.004))
    assert found.dense_rows == crossover_position(costs, 0.004, 1, SaleConfig()) > 1024
    assert found.centre_tokens == SaleConfig().centre_tokens


def test_where_every_row_is_short_there_is_no_execution_rate() -> None:
    (row,) = measure(
        random_trace(128), [Setting("reference", 1, 0.05, DENSE_ROWS)], CEILINGS, DenseBaseline(), rounds=1
    )
    assert row.execution_gflops is None
    assert row.floor.total == row.floor.dense
    assert row.density == 1


def test_a_backend_that_goes_dense_is_not_timed_as_sale() -> None:
    with pytest.raises(SystemExit, match="runs these traces dense"):
        measure(
            random_trace(head_dim=2048),
            [Setting("reference", 1, 0.05, DENSE_ROWS)],
            CEILINGS,
            DenseBaseline(),
            rounds=1,
        )


def test_a_backend_that_fell_back_to_the_reference_is_not_timed_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class FellBack:
        description = "reference"

    monkeypatch.setattr(attention_measure, "get_backend", lambda name: FellBack())
    assert describe_backend("reference") == "reference"
    with pytest.raises(SystemExit, match="'cpu' has no kernels"):
        describe_backend("cpu")
