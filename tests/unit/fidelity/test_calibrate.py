"""Calibration of a tiny model, end to end: what the command writes is a profile that fits, and the same every time."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sale_attention import ModelFingerprint, Profile, SaleConfig, load_profile
from sale_attention.profile import dumps_profile, loads_profile
from sale_fidelity.calibration import run
from sale_fidelity.calibration.capture import LayerCapture, forward_layers
from sale_fidelity.calibration.measure import Measurement, count_errors
from sale_fidelity.calibration.paper import TAUS, paper_losses, paper_taus, settled_taus
from sale_fidelity.calibration.rows import solve_rows
from sale_fidelity.calibration.solve import HeadChoices, lower_hull, solve
from sale_fidelity.calibration.state import CalibrationState
from sale_fidelity.calibration.texts import Document
from sale_fidelity.cli import _documents as chosen_documents
from sale_fidelity.cli import add_calibrate_arguments, calibrate
from sale_fidelity.models import FidelityModel, load_model
from sale_prefill_client.cli import main
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model
from tests.support import tokens_of

CONFIG = SaleConfig(dense_rows=256, centre_tokens=256)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> FidelityModel:
    return load_model(str(tiny_model), device="cpu", dtype="float32")


def documents(count: int = 2) -> list[Document]:
    return [Document(f"random {seed}", tuple(tokens_of(640, seed))) for seed in range(count)]


def calibrated(model: FidelityModel, folder: Path, budget: float = 0.001, method: str = "budget") -> Profile:
    return calibrate(model, documents(), budget, method=method, config=CONFIG, state_root=folder)


def test_levels_ascend_in_budget_and_descend_in_cost(model: FidelityModel, tmp_path: Path) -> None:
    profile = calibrated(model, tmp_path)
    assert profile.fingerprint == ModelFingerprint.of(model.module)
    assert profile.levels[profile.default_level].error_budget == 0.001
    costs = [level.estimated_cost for level in profile.levels]
    assert costs == sorted(costs, reverse=True)
    for level in profile.levels:
        measures = [head for layer in level.measures for head in layer]
        assert all(0 <= head.mean_error <= head.p99_error for head in measures)
        dense = [head for layer in level.settings for head in layer if head.strategy == "dense"]
        assert sum(measure.density == 1.0 for measure in measures) >= len(dense)
    assert not list(tmp_path.iterdir()), "finished pieces go once the profile is there"


def test_the_same_calibration_gives_the_same_profile(model: FidelityModel, tmp_path: Path) -> None:
    assert calibrated(model, tmp_path / "one").digest == calibrated(model, tmp_path / "two").digest


def test_an_interrupted_calibration_goes_on_where_it_was(
    model: FidelityModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrated(model, tmp_path / "whole").digest
    saved = CalibrationState.save
    pieces: list[str] = []

    def save(state: CalibrationState, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if len(pieces) == 4:
            raise KeyboardInterrupt
        pieces.append(name)
        saved(state, name, tensors)

    monkeypatch.setattr(CalibrationState, "save", save)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, tmp_path / "broken")
    again: list[str] = []
    monkeypatch.setattr(
        CalibrationState, "save", lambda state, name, tensors: (again.append(name), saved(state, name, tensors))
    )
    assert calibrated(model, tmp_path / "broken").digest == expected
    assert pieces
    assert not set(pieces) & set(again)


def test_the_papers_method_halves_tau_until_the_error_fits(model: FidelityModel, tmp_path: Path) -> None:
    profile = calibrated(model, tmp_path, method="paper")
    found = run.measure_taus(model, documents()[0], profile.key_centres, CONFIG, CalibrationState(tmp_path, {}))
    assert profile.method == "paper"
    assert [[head.tau or 0.0 for head in layer] for layer in profile.levels[0].settings] == found
    assert {tau for layer in found for tau in layer} <= {0.0, *TAUS}


def test_halving_and_all_losses_at_once_find_the_same_thresholds(model: FidelityModel) -> None:
    centre = torch.zeros(model.num_kv_heads, model.head_dim)
    seen: list[list[float]] = []

    def look(capture: LayerCapture) -> None:
        losses = paper_losses(capture, centre, CONFIG)
        theta = float(losses.median())
        seen.append(settled_taus(losses, theta))
        assert seen[-1] == paper_taus(capture, centre, CONFIG, theta)

    forward_layers(model, documents(1)[0].token_ids, look)
    assert len({tau for layer in seen for tau in layer}) > 1


def test_the_papers_thresholds_stay_above_a_ten_thousandth() -> None:
    assert TAUS == (0.000125, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)


def test_a_stricter_theta_never_raises_a_threshold(model: FidelityModel, tmp_path: Path) -> None:
    (document,) = documents(1)
    centres = torch.zeros(model.num_layers, model.num_kv_heads, model.head_dim)
    found = [
        run.measure_taus(model, document, centres, CONFIG, CalibrationState(tmp_path / str(theta), {}), theta=theta)
        for theta in (10.0, 0.4, 1e-9)
    ]
    loose, usual, strict = (torch.tensor(taus) for taus in found)
    assert bool((loose == 0.008).all())
    assert bool((usual <= loose).all())
    assert bool((strict == 0).all())


def test_documents_that_are_too_short_are_refused(model: FidelityModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"too short to calibrate on \(up to 256 tokens\): note"):
        calibrate(model, [Document("note", (1, 2, 3))], 0.001, config=CONFIG, state_root=tmp_path)


class TestSolve:
    def test_a_hull_leaves_out_what_a_mixture_beats(self) -> None:
        assert lower_hull([0.0, 0.5, 1.0], [1.0, 0.9, 0.0]) == [0, 2]
        assert lower_hull([0.0, 0.5, 1.0], [1.0, 0.1, 0.0]) == [0, 1, 2]

    def test_the_steepest_steps_come_first_and_budgets_are_kept(self) -> None:
        cost = torch.tensor([[0.1, 1.0], [0.1, 1.0]], dtype=torch.float64)
        effect = torch.tensor([[1.0, 0.0], [0.2, 0.0]], dtype=torch.float64)
        choices = HeadChoices(cost, effect)
        assert solve(choices, [2.0, 0.5, 0.1, 0.0]) == [[0, 0], [1, 0], [1, 1], [1, 1]]

    def test_a_negative_budget_is_refused(self) -> None:
        with pytest.raises(ValueError, match="-1"):
            solve(HeadChoices(torch.zeros(1, 1), torch.zeros(1, 1)), [-1.0])


def test_the_command_writes_a_profile_that_loads(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sale_fidelity.cli._documents", lambda model, arguments: long_documents())
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "profile.json"
    assert main(["calibrate", str(tiny_model), "--output", str(output), "--error-budget", "0.01"]) == 0
    profile = load_profile(output)
    assert profile.levels[profile.default_level].error_budget == 0.01
    assert f"--profile {output}" in capsys.readouterr().err


def long_documents() -> list[Document]:
    return [replace(document, token_ids=tuple(tokens_of(1200, 7))) for document in documents(1)]


def test_the_paper_has_an_objective_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--method", "paper", "--objective", "rows"]
    assert main(["calibrate", "m", "--output", str(tmp_path / "p.json"), *both]) == 1
    assert "leave out --objective or --method" in capsys.readouterr().err


def test_costs_may_be_another_machines(model: FidelityModel, tmp_path: Path) -> None:
    profile = calibrate(model, documents(), 0.001, config=CONFIG, backend="cpu-avx2", state_root=tmp_path)
    assert profile.created_with["costs"] == "cpu-avx2"


def test_a_budget_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "m", "--output", str(tmp_path / "p.json"), "--error-budget", "0"]) == 1
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--error-budget", "nan"], "--error-budget nan: must be above 0 and finite"),
        (["--error-budget", "1e308"], r"--error-budget 1e\+308: must be above 0 and finite"),
        (["--method", "paper", "--error-budget", "0.1"], "--error-budget 0.1: --method paper has a bound of its own"),
        (["--tokens", "1024"], "--tokens 1024: must be above 1024"),
        (["--text", "missing.txt"], "--text missing.txt: there is no such file"),
        (["--output", "missing/p.json"], "--output missing/p.json: cannot be written; name a file"),
        (["--output", "."], "--output .: cannot be written"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "no-such-model", "--output", "p.json", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_measurements_stay_until_the_profile_is_written(model: FidelityModel, tmp_path: Path) -> None:
    output, pieces = tmp_path / "profile.json", tmp_path / "pieces"
    output.mkdir()
    with pytest.raises(OSError):
        calibrate(model, documents(), 0.001, config=CONFIG, state_root=pieces, output=output)
    assert list(pieces.glob("*/measured-*"))
    output.rmdir()
    profile = calibrate(model, documents(), 0.001, config=CONFIG, state_root=pieces, output=output)
    assert load_profile(output).digest == profile.digest
    assert not list(pieces.iterdir())


def test_two_calibrations_may_be_at_the_same_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (CalibrationState(tmp_path, {"model": "m"}) for _ in range(2))
    monkeypatch.setattr("sale_fidelity.calibration.state.save_file", interrupted_by(other))
    one.save("piece", {"sums": torch.ones(2)})
    found = one.load("piece")
    assert found is not None
    assert found["sums"].tolist() == [1.0, 1.0]
    assert [file.name for file in one.folder.iterdir()] == ["piece.safetensors"]


def interrupted_by(other: CalibrationState) -> Callable[[dict[str, torch.Tensor], Path], None]:
    """`save_file` in the middle of whose first call `other` saves the same piece."""
    calls: list[Path] = []

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save_file(tensors, file)
        calls.append(file)
        if len(calls) == 1:
            other.save("piece", tensors)

    return save


class TestRows:
    """Budgets on the p99 of row errors."""

    def test_the_p99_of_all_heads_together_keeps_within_the_budget(self) -> None:
        layer = measured_rows({0.1: [0.5, 0.01], 0.9: [0.05, 0.001]})
        assert solve_rows([layer], 1.0) == [0, 0]
        assert solve_rows([layer], 0.1) == [1, 0]
        assert solve_rows([layer], 0.02) == [2, 0]

    def test_a_head_may_lose_more_than_one_row_in_a_hundred_where_others_lose_fewer(self) -> None:
        errors = torch.full((4, 1, 1000), 0.001)
        errors[0, :, :35] = 1.0  # 35 of 4,000 rows, all of one head
        density = torch.full((4, 1), 10, dtype=torch.int64)
        assert solve_rows([counted(errors, density)], 0.1) == [0, 0, 0, 0]
        errors[0, :, :45] = 1.0
        assert solve_rows([counted(errors, density)], 0.1) == [1, 0, 0, 0]

    @pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
    def test_a_budget_must_be_above_0(self, budget: float) -> None:
        with pytest.raises(ValueError, match=r"must be above 0"):
            solve_rows([measured_rows({0.5: [0.1]})], budget)

    def test_levels_keep_their_budgets_and_say_what_predictions_lose(
        self, model: FidelityModel, tmp_path: Path
    ) -> None:
        profile = calibrated(model, tmp_path, 0.05, method="rows")
        assert profile.method == "rows"
        assert profile.levels[profile.default_level].p99_error <= 0.05
        assert all(level.error_budget > 0 for level in profile.levels)
        densities = [level.density for level in profile.levels]
        assert densities == sorted(densities, reverse=True)
        assert loads_profile(dumps_profile(profile)) == profile


@pytest.mark.parametrize("objective", ["predictions", "rows"])
def test_key_value_retrieval_is_among_the_texts_except_for_rows(model: FidelityModel, objective: str) -> None:
    reader = replace(model, tokenizer=AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL).path))
    parser = argparse.ArgumentParser()
    add_calibrate_arguments(parser)
    given = parser.parse_args(["m", "--output", "p.json", "--tokens", "1500", "--objective", objective])
    names = [document.name for document in chosen_documents(reader, given)]
    assert ("key-value retrieval, seed 0" in names) == (objective == "predictions")
    assert "ipaddress.py" in names


def measured_rows(errors: dict[float, list[float]]) -> Measurement:
    """One layer whose settings, by density, put all rows of each head off by as much as listed."""
    heads = len(next(iter(errors.values())))
    rows = torch.tensor(list(errors.values())).t().unsqueeze(2).expand(heads, len(errors), 1000)
    blocks = torch.tensor([round(100 * density) for density in errors]).expand(heads, len(errors))
    return counted(rows, blocks)


def counted(errors: torch.Tensor, blocks: torch.Tensor) -> Measurement:
    """Errors `[H, settings, rows]` at `blocks` of 100 key blocks."""
    zero = Measurement.zero(*errors.shape[:2])
    return replace(
        zero,
        rows=torch.tensor(errors.shape[2]),
        causal_blocks=torch.tensor(100),
        computed_blocks=blocks,
        histogram=count_errors(errors),
    )
