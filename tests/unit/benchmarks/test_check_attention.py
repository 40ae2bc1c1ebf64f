"""Each line of `make check-attention` holds or fails by what was measured; small trials are not taken for promises."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import check_attention
from benchmarks.attention_floor import Ceilings, Floor
from benchmarks.attention_measure import Row, Setting, Spread
from benchmarks.attention_traces import save_trace
from benchmarks.check_attention import (
    Plan,
    add_estimation,
    add_execution,
    add_first_token,
    add_growth,
    add_slowdown,
    add_speedup,
    check_error,
    check_kit,
    check_sanitizers,
    check_speed,
    dense_servers,
    last_line,
    parse_arguments,
    yarn_copy,
)
from benchmarks.report import Line, Report
from sale_prefill_server.engine.model import load_model
from tests.support import TINY_CONTEXT

CEILINGS = Ceilings(bf16_flops=380e9, int8_ops=800e9, copy_bytes=20e9, workers=2)


class Lines(Report):
    """A report whose lines can be read."""

    def __init__(self) -> None:
        super().__init__("test")

    @property
    def all(self) -> list[Line]:
        return self._lines

    @property
    def only(self) -> Line:
        (line,) = self._lines
        return line


@pytest.fixture
def report() -> Lines:
    return Lines()


def row(speedup: float = 6.0, *, tokens: int = 32768, stride: int = 2, select: float = 0.06, **changes: Any) -> Row:
    shares = {"quantise": 0.01, "sink_local": 0.02, "select": select, "compute": 0.1, "dense": 0.0}
    made = Row(
        trace="layer01_kv0",
        model="some model",
        tokens=tokens,
        short_rows=1024,
        heads=3,
        head_dim=128,
        setting=Setting("cpu", stride, 0.004),
        runs_on="cpu-avx512",
        rounds=5,
        dense_variant="enable_gqa",
        dense_seconds=Spread(1.0, 1.0, 1.0),
        seconds=Spread(1 / speedup, 1 / speedup, 1 / speedup),
        speedup=Spread(speedup, speedup, speedup),
        phase_seconds=shares,
        dense_shares=shares,
        density=0.1,
        l1_error=0.05,
        dense_gflops=80.0,
        execution_gflops=130.0,
        floor=Floor(0.4, 0.048, 0.05, 0.1),
    )
    return dataclasses.replace(made, **changes)


def test_a_speedup_is_the_median_over_the_traces(report: Lines) -> None:
    add_speedup(report, [row(4.0), row(5.0), row(5.2), row(9.0)], 5.0)
    assert report.only.passed
    assert report.only.measured == "5.10x (4.00-9.00 by trace; 10.0x at the floor)"
    assert "32768 tokens, stride 2" in report.only.line


def test_a_speedup_that_falls_short_fails(report: Lines) -> None:
    add_speedup(report, [row(4.0), row(4.9), row(5.0), row(9.0)], 5.0)
    assert not report.only.passed


@pytest.mark.parametrize(("slowest", "passed"), [(1 / 1.029, True), (1 / 1.031, False), (1.2, True)])
def test_short_prompts_are_judged_by_the_worst_row(report: Lines, slowest: float, passed: bool) -> None:
    add_slowdown(report, [row(slowest, tokens=1024), row(1.3, tokens=1024)])
    assert report.only.passed is passed
    assert report.only.measured.split()[1] == ("slower" if slowest < 1 else "faster")


@pytest.mark.parametrize(("share", "passed"), [(0.069, True), (0.071, False)])
def test_estimation_is_the_select_phase(report: Lines, share: float, passed: bool) -> None:
    add_estimation(report, [row(select=share)], 0.07)
    assert report.only.passed is passed
    assert "floor 4.8%" in report.only.measured
    assert "quantise 1.0%, sink-local 2.0%" in report.only.measured


@pytest.mark.parametrize(("rate", "passed"), [(121.0, True), (119.0, False), (None, False)])
def test_execution_is_a_rate_a_core(report: Lines, rate: float | None, passed: bool) -> None:
    add_execution(report, [row(execution_gflops=rate)], CEILINGS)
    assert report.only.passed is passed
    assert "torch SDPA 80; bf16 matrix product 190" in report.only.measured


def test_the_faster_dense_server_is_the_baseline(report: Lines) -> None:
    seconds = {"SALE": 10.0, "dense in chunks": 16.0, "dense in one piece": 14.0}
    add_first_token(report, "model", seconds, 1.5, {})
    assert not report.only.passed
    assert report.only.measured.startswith("1.40x over dense in one piece: SALE 10.0 s")


@pytest.mark.parametrize(("longer_bytes", "passed"), [(430, True), (450, False)])
def test_memory_may_grow_as_the_length_does(report: Lines, longer_bytes: int, passed: bool) -> None:
    add_growth(report, {7500: 100 << 20, 30000: longer_bytes << 20}, 7500, 30000)
    assert report.only.passed is passed
    assert report.only.required == "<= 4.40 (linear: 4)"


def test_whole_prompts_fit_one_chunk() -> None:
    assert dense_servers(7681)["dense in one piece"][-1] == str(61 * 128)


def test_yarn_stretches_the_context_of_a_copy(tiny_model: Path, tmp_path: Path) -> None:
    before = (tiny_model / "config.json").read_text()
    copy = yarn_copy(tiny_model, tmp_path, 4.0)
    model = load_model(copy, "copy", device=torch.device("cpu"), dtype="float32")
    assert model.max_sequence_tokens == 4 * TINY_CONTEXT
    assert model.module.config.rope_parameters["rope_type"] == "yarn"
    plain = load_model(tiny_model, "plain", device=torch.device("cpu"), dtype="float32")
    assert not model.module.model.rotary_emb.inv_freq.equal(plain.module.model.rotary_emb.inv_freq)
    assert json.loads((copy / "config.json").read_text())["rope_parameters"]["factor"] == 4.0
    assert (tiny_model / "config.json").read_text() == before


def write_traces(folder: Path, tokens: int) -> Path:
    for layer in (1, 2):
        tensors = [torch.randn(heads, tokens, 16).to(torch.bfloat16) for heads in (2, 1, 1)]
        save_trace(folder / f"{layer}.safetensors", *tensors, {"layer": str(layer), "kv_head": "0"})
    return folder


def test_the_lines_on_traces(report: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.attention_floor._GEMM_SIZE", {"cpu": 64})
    monkeypatch.setattr("benchmarks.attention_floor._COPY_BYTES", {"cpu": 1 << 16})
    traces = write_traces(tmp_path, 1280)
    plan = Plan("reference", traces, rounds=1, dense_rows=1024, full=1280, middle=1152, short=(256,))
    check_speed(report, plan)
    assert len(report.all) == 3 + 1 + 2 + 2
    assert [len(line.details["rows"]) for line in report.all[:4]] == [2, 2, 2, 4]


def test_the_reference_errs_as_the_reference_does(report: Lines, tmp_path: Path) -> None:
    check_error(report, Plan("reference", write_traces(tmp_path, 1280), dense_rows=1024, full=1280))
    assert report.only.passed
    assert report.only.measured.startswith("1.0000x")
    assert len(report.only.details["runs"]) == 4


def test_traces_that_are_too_short_are_refused(report: Lines, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has 1280 tokens; this check needs 32768"):
        check_error(report, Plan("reference", write_traces(tmp_path, 1280)))


def scripted(monkeypatch: pytest.MonkeyPatch, code: int, output: str) -> list[dict[str, Any]]:
    """Stands in for subprocesses; returns what they were started with."""
    started: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> Any:
        started.append({"command": command, **options})
        return subprocess.CompletedProcess(command, code, stdout=output)

    monkeypatch.setattr(check_attention.subprocess, "run", run)
    return started


def test_the_kit_runs_with_each_instruction_set_forced(report: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_attention, "available_isas", lambda: ("avx512", "avx2"))
    started = scripted(monkeypatch, 0, "....\n12 passed, 1 skipped in 3.2s\n")
    check_kit(report, Plan())
    assert [run["env"]["SALE_PREFILL_CPU_ISA"] for run in started] == ["avx512", "avx2"]
    assert all(line.passed for line in report.all)
    assert report.all[0].measured == "12 passed, 1 skipped in 3.2s"


@pytest.mark.parametrize(("code", "output"), [(1, "1 failed, 12 passed in 3.2s"), (5, "no tests ran in 0.1s")])
def test_a_kit_that_fails_or_is_empty_fails(
    report: Lines, monkeypatch: pytest.MonkeyPatch, code: int, output: str
) -> None:
    monkeypatch.setattr(check_attention, "available_isas", lambda: ("avx512", "avx2"))
    scripted(monkeypatch, code, output)
    check_kit(report, Plan())
    assert not any(line.passed for line in report.all)


def test_a_path_that_this_machine_lacks_fails(report: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_attention, "available_isas", lambda: ("avx2", "portable"))
    scripted(monkeypatch, 0, "12 passed in 3.2s")
    check_kit(report, Plan())
    assert [line.passed for line in report.all] == [False, True, True]
    assert "AVX-512" in report.all[0].line


@pytest.mark.parametrize(
    ("code", "output", "passed"),
    [
        (0, "12 passed in 3.2s", True),
        (2, "make: *** [check-sanitize] Error 1", False),
        (0, "select.h:3:1: runtime error: signed integer overflow\n12 passed in 3.2s", False),
        (0, "==7==ERROR: AddressSanitizer: heap-buffer-overflow\n12 passed in 3.2s", False),
    ],
)
def test_a_sanitizers_finding_counts_whatever_the_exit_status(
    report: Lines, monkeypatch: pytest.MonkeyPatch, code: int, output: str, passed: bool
) -> None:
    scripted(monkeypatch, code, output)
    check_sanitizers(report, Plan())
    assert report.only.passed is passed


def test_the_last_line_is_what_pytest_said() -> None:
    assert last_line("...\n====== 3 passed in 1.0s ======\n\n") == "3 passed in 1.0s"
    assert last_line("") == "no output"


def test_the_defaults_are_what_is_promised() -> None:
    plan, only = parse_arguments([])
    assert plan == Plan()
    assert only is None
    assert (plan.full, plan.middle, plan.short, plan.served, plan.long) == (32768, 8192, (1024, 2048), 7680, 30000)
    smaller, only = parse_arguments(["--only", "speed", "--full", "2048", "--short", "512", "--backend", "reference"])
    assert (smaller.full, smaller.short, smaller.backend, only) == (2048, (512,), "reference", ["speed"])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "attention"),
        (["--traces", "elsewhere"], "attention"),
        (["--only", "kit"], "attention-partial"),
        (["--full", "2048"], "attention-partial"),
    ],
)
def test_trials_are_written_to_a_file_of_their_own(
    arguments: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    class Unwritten(Report):
        def __init__(self, name: str) -> None:
            names.append(name)

        def finish(self, command: str) -> int:
            return 0

    monkeypatch.setattr(check_attention, "Report", Unwritten)
    monkeypatch.setattr(check_attention, "CHECKS", {"kit": lambda report, plan: None})
    monkeypatch.setattr(check_attention, "describe_backend", lambda name: name)
    monkeypatch.setattr(check_attention, "available_backends", lambda: ("cpu",))
    assert check_attention.main(arguments) == 0
    assert names == [name]


def test_a_backend_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_attention.main(["--backend", "abacus", "--only", "kit"]) == 1
    assert "no attention backend 'abacus'" in capsys.readouterr().out
