"""The comparison of SALE with its peers: what it measures, what it says, and that it can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.attention_plot import can_plot
from benchmarks.attention_traces import Trace
from benchmarks.fidelity_peers import Point, measure_trace, peer_rows, pooled
from benchmarks.fidelity_peers_model import NeedleItem, measure_method
from benchmarks.gpu_rows import Row
from sale_fidelity.agreement import dense_reference
from sale_fidelity.models import load_model
from sale_fidelity.peers import Method, Sale, StreamingLlm, VerticalSlash, methods
from tests.unit.attention.naive import Shape, random_problem

COMPARED = (
    Method("SALE", (Sale(),), "SALE"),
    Method("MInference", (VerticalSlash((30, 2048)), VerticalSlash((3000, 200)))),
    Method("StreamingLLM", (StreamingLlm(),)),
)


def trace(seed: int) -> Trace:
    """1,536 tokens of two heads with a few strong matches far away."""
    query, kv = random_problem(Shape(1536, heads=2), seed=seed)
    return Trace(f"trace {seed}", "hand-made", query, kv.keys, kv.values, 64**-0.5)


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return [
        point
        for seed in (0, 1)
        for point in measure_trace(trace(seed), blocks=4, densities=(0.5,), costs=(0.2, 0.8), compared=COMPARED)
    ]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return peer_rows([trace(0), trace(1)], blocks=4, densities=(0.5,), costs=(0.2, 0.8), compared=COMPARED)


def test_densities_are_the_ones_asked_for(points: list[Point]) -> None:
    for point in points:
        if point.solved in ("head", "shared"):
            assert point.density == pytest.approx(point.target, abs=0.03)


def test_on_every_trace_all_methods_have_the_density_of_sale_at_its_default_threshold(points: list[Point]) -> None:
    own = [point for point in points if point.solved == "own"]
    assert {point.method for point in own} == {method.name for method in COMPARED}
    for point in own:
        (sale,) = (other for other in own if (other.trace, other.method) == (point.trace, "SALE"))
        assert point.density == pytest.approx(sale.density, abs=0.03)


def test_costs_are_what_is_kept_and_the_estimation(points: list[Point]) -> None:
    for point in points:
        if point.solved == "cost" and point.target == 0.8:
            assert point.cost == pytest.approx(0.8, abs=0.03)
            assert (point.density < point.cost) == (point.method != "StreamingLLM")


def test_what_costs_too_much_to_estimate_is_left_out(points: list[Point]) -> None:
    cheap = {point.method for point in points if point.solved == "cost" and point.target == 0.2}
    assert "SALE" not in cheap  # its sink-local pass and its products cost more than a fifth of so short a prompt
    assert "StreamingLLM" in cheap


def test_a_head_takes_one_of_the_methods_settings(points: list[Point]) -> None:
    for point in points:
        expected = {rule.setting for method in COMPARED if method.name == point.method for rule in method.rules}
        assert set(point.settings) <= expected
        assert len(point.settings) == (2 if point.method == "MInference" else 0)


def test_pooled_rows_are_those_of_all_traces(points: list[Point]) -> None:
    found = {(point.method, point.solved, point.target): point for point in pooled(points)}
    for key, whole in found.items():
        parts = [point.errors for point in points if (point.method, point.solved, point.target) == key]
        assert torch.equal(whole.errors, torch.cat(parts))


def test_lines_at_equal_density_must_hold_and_those_at_equal_cost_inform(rows: list[Row]) -> None:
    assert [bool(row.required) for row in rows] == [True, True, True, False, False]
    assert rows[0].passed == (rows[0].details["below_pooled"] and len(rows[0].details["below_on"]) >= 2)
    assert "SALE alone costs more" in rows[3].measured
    assert len(rows[0].details["points"]) == 3 * 14  # two traces and pooled; SALE has no point at the least cost


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed")
def test_points_can_be_drawn(rows: list[Row], tmp_path: Path) -> None:
    from benchmarks.fidelity_peers_plot import plot

    plot(rows[0].details["points"], tmp_path / "peers.svg")
    drawn = (tmp_path / "peers.svg").read_text()
    assert drawn.startswith("<?xml")
    assert len(drawn) > 10_000


@pytest.mark.parametrize("by_head", [False, True])
def test_a_method_runs_through_a_model(tiny_model: Path, by_head: bool) -> None:
    model = load_model(str(tiny_model), device="cpu", dtype="float32")
    text = torch.randint(0, 256, (1600,), generator=torch.Generator().manual_seed(0)).tolist()
    reference = dense_reference(model, text, first=1024)
    needle = NeedleItem(tuple(text), answer_tokens=4, depth=0.5)
    kept = measure_method(model, methods()[0], 1.0, [reference], [needle], by_head=by_head)
    assert kept.density == pytest.approx(1.0)
    assert kept.kl < 1e-6
    less = measure_method(model, methods()[0], 0.4, [reference], [needle], by_head=by_head)
    assert less.density == pytest.approx(0.4, abs=0.05)
    assert less.kl > kept.kl
