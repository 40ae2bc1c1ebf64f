"""Tables show medians over the traces, floors beside the figures, in straight columns."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.attention_plot import can_plot, plot, series
from benchmarks.attention_table import columns, summarise, summary_table, trace_table

CEILINGS = {"bf16_flops": 380e9, "int8_ops": 800e9, "copy_bytes": 20e9, "workers": 2}


def row(trace: str, tokens: int, stride: int, speedup: float, execution_gflops: float | None = 130.0) -> dict[str, Any]:
    dense = 1.0
    phases = {"quantise": 0.01, "sink_local": 0.02, "select": 0.1, "compute": 0.3, "dense": 0.0}
    return {
        "trace": trace,
        "model": "some model",
        "tokens": tokens,
        "short_rows": 1024,
        "setting": {"backend": "cpu", "stride": stride, "tau": 0.004, "dense_rows": 0},
        "rounds": 5,
        "dense_seconds": {"median": dense, "low": 0.9, "high": 1.1},
        "seconds": {"median": dense / speedup, "low": 0.1, "high": 0.3},
        "speedup": {"median": speedup, "low": speedup - 0.5, "high": speedup + 0.5},
        "phase_seconds": phases,
        "dense_shares": phases,
        "density": 0.12,
        "l1_error": 0.05,
        "dense_gflops": 80.0,
        "execution_gflops": execution_gflops,
        "floor": {"dense": 0.4, "estimation": 0.09, "execution": 0.06, "total": 0.15},
    }


ROWS = [row("a", 8192, 2, 2.0), row("b", 8192, 2, 4.0), row("c", 8192, 2, 3.0), row("a", 1024, 1, 1.0, None)]


def test_summaries_are_medians_over_the_traces() -> None:
    short, long = summarise(ROWS)
    assert (long["tokens"], long["stride"], long["traces"]) == (8192, 2, 3)
    assert (long["speedup"], long["speedup_range"]) == (3.0, [2.0, 4.0])
    assert long["seconds"] == pytest.approx(1 / 3)
    assert long["dense_shares"]["select"] == 0.1
    assert (short["tokens"], short["execution_gflops"]) == (1024, None)


def test_columns_are_straight() -> None:
    assert columns(["name", "n"], [["a", "10"], ["longer", "7"]]) == "name     n\na       10\nlonger   7"


def test_the_tables_show_figures_and_floors() -> None:
    by_trace = trace_table(ROWS).splitlines()
    assert len(by_trace) == 1 + len(ROWS)
    assert "2.00 (1.50-2.50)" in by_trace[1]
    text = summary_table(summarise(ROWS), CEILINGS)
    line = next(line for line in text.splitlines() if line.startswith("8192"))
    for figure in ("1000.0", "400.0", "333.3", "150.0", "3.00", "2.00-4.00", "10.0%", "9.0%", "130", "80"):
        assert figure in line.split()
    assert "bf16 190 GFLOP/s, int8 400 GOP/s" in text


def test_series_of_the_plot_go_by_length() -> None:
    found = series(summarise([row("a", tokens, stride, 2.0) for tokens in (8192, 1024) for stride in (2, 1)]))
    assert {name: [point["tokens"] for point in points] for name, points in found.items()} == {
        "cpu, stride 1": [1024, 8192],
        "cpu, stride 2": [1024, 8192],
    }


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed; the benchmark says so and draws nothing")
def test_the_same_figures_make_the_same_plot(tmp_path: Any) -> None:
    for name in ("one.svg", "two.svg"):
        plot(summarise(ROWS), "title", tmp_path / "figures" / name)
    assert (tmp_path / "figures" / "one.svg").read_bytes() == (tmp_path / "figures" / "two.svg").read_bytes()
