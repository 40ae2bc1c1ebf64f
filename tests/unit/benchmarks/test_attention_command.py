"""`benchmarks.attention` from traces to tables, JSON and plot, on small random traces with the reference backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention
from benchmarks.attention_plot import can_plot
from benchmarks.attention_traces import save_trace


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.attention_floor._GEMM_SIZE", {"cpu": 64})
    monkeypatch.setattr("benchmarks.attention_floor._COPY_BYTES", {"cpu": 1 << 16})


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    for layer, tokens in ((3, 1280), (4, 1088)):
        tensors = [torch.randn(heads, tokens, 16).to(torch.bfloat16) for heads in (2, 1, 1)]
        metadata = {"layer": str(layer), "kv_head": "0", "model": "random"}
        save_trace(folder / f"layer{layer}.safetensors", *tensors, metadata)
    return folder


def arguments_for(traces: Path, *more: str) -> list[str]:
    options = ["--traces", str(traces), "--backends", "reference", "--dense-rows", "1024", "--rounds", "1"]
    return [*options, "--device", "cpu", *more]


def test_it_writes_what_it_prints(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "small.json"
    options = arguments_for(traces, "--lengths", "1088", "1280", "--out", str(out), "--no-plot")
    assert attention.main(options) == 0
    results = json.loads(out.read_text())
    assert results["commit"]
    assert results["device"]["threads"] == torch.get_num_threads()
    assert set(results["versions"]) == {"python", "torch", "transformers"}
    assert results["command"].startswith("python -m benchmarks.attention --traces")
    assert results["measured_on"] == "cpu"
    measured = [(row["trace"], row["tokens"], row["setting"]["stride"]) for row in results["rows"]]
    # The second trace is too short for the longer length.
    assert measured == [
        ("layer03_kv0", 1088, 1),
        ("layer03_kv0", 1088, 2),
        ("layer03_kv0", 1280, 1),
        ("layer03_kv0", 1280, 2),
        ("layer04_kv0", 1088, 1),
        ("layer04_kv0", 1088, 2),
    ]
    assert [row["traces"] for row in results["summary"]] == [2, 2, 1, 1]
    assert [found["tokens"] for found in results["dense_variants"]] == [1088, 1280]
    printed = capsys.readouterr()
    assert "layer04_kv0 has 1088 tokens: no 1280" in printed.err
    assert "speed-up" in printed.out
    assert f"written to {out}" in printed.out

    assert attention.main(["--redraw", str(out), "--no-plot"]) == 0
    assert capsys.readouterr().out in printed.out.replace(f"written to {out}\n", "")


def test_lengths_that_no_trace_has_are_an_error(traces: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no trace is 4096 tokens long"):
        attention.main(arguments_for(traces, "--lengths", "4096", "--out", str(tmp_path / "none.json"), "--no-plot"))
    assert not (tmp_path / "none.json").exists()


def test_a_missing_plot_library_costs_no_figures(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "can_plot", lambda: False)
    out = tmp_path / "small.json"
    assert attention.main(arguments_for(traces, "--lengths", "1088", "--strides", "1", "--out", str(out))) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"]


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed; the benchmark says so and draws nothing")
def test_it_plots(traces: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "small.json", tmp_path / "figures" / "small.svg"
    options = arguments_for(traces, "--lengths", "1088", "--out", str(out), "--plot", str(picture))
    assert attention.main(options) == 0
    assert "<svg" in picture.read_text()


def test_the_reference_is_measured_by_default_only_where_there_is_nothing_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "available_backends", lambda: ("reference", "dense", "quick"))
    assert attention.default_backends() == ["quick"]
    monkeypatch.setattr(attention, "available_backends", lambda: ("reference", "dense"))
    assert attention.default_backends() == ["reference"]
