"""Traces are found where the user says, else where the project keeps them, else captured; files say what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import attention_traces, capture_traces
from benchmarks.attention_traces import (
    TRACES_VARIABLE,
    describe_scale,
    load_trace,
    locate_traces,
    parse_scale,
    save_trace,
    slug,
)
from sale_prefill_server.models.cache import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def _nothing_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TRACES_VARIABLE, raising=False)
    monkeypatch.setattr(attention_traces, "ROOT", tmp_path / "repository")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def write_trace(file: Path, **metadata: str) -> Path:
    query, keys, values = (torch.randn(heads, 40, 8).to(torch.bfloat16) for heads in (2, 1, 1))
    save_trace(file, query, keys, values, metadata)
    return file


def test_a_trace_reads_as_it_was_written(tmp_path: Path) -> None:
    query, keys, values = (torch.randn(heads, 40, 8).to(torch.bfloat16) for heads in (3, 1, 1))
    metadata = {"model": "m", "layer": "7", "kv_head": "1", "scale": "0.25"}
    save_trace(tmp_path / "new" / "trace.safetensors", query, keys, values, metadata)
    trace = load_trace(tmp_path / "new" / "trace.safetensors")
    assert (trace.name, trace.model, trace.scale) == ("layer07_kv1", "m", 0.25)
    assert (trace.tokens, trace.heads, trace.head_dim) == (40, 3, 8)
    assert trace.query.equal(query[None])
    assert trace.keys.equal(keys[None])
    assert trace.values.equal(values[None])
    start = trace.prefix(16)
    assert start.query.equal(query[None, :, :16])
    assert start.query.is_contiguous()
    assert start.kv.tokens == 16


def test_a_file_without_metadata_goes_by_its_own_name(tmp_path: Path) -> None:
    trace = load_trace(write_trace(tmp_path / "mine.safetensors"))
    assert (trace.name, trace.scale) == ("mine", pytest.approx(8**-0.5))


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"q": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match="lacks k, v"):
        load_trace(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("scale", [64**-0.5, 0.0625, 1.0])
def test_scales_survive_the_metadata(scale: float) -> None:
    assert parse_scale({"scale": describe_scale(scale, 64)}, 64) == pytest.approx(scale)


def test_slugs_are_parts_of_file_names() -> None:
    assert slug("Qwen/Qwen2.5 Coder_1.5B") == "qwen-qwen2.5-coder-1.5b"


def test_the_folder_named_wins_over_the_variable_and_that_over_the_shared_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = write_trace(tmp_path / "shared" / "traces" / "a.safetensors")
    variable = write_trace(tmp_path / "variable" / "b.safetensors")
    named = write_trace(tmp_path / "named" / "c.safetensors")
    assert locate_traces() == [shared]
    monkeypatch.setenv(TRACES_VARIABLE, str(variable.parent))
    assert locate_traces() == [variable]
    assert locate_traces(named.parent) == [named]


def test_a_named_folder_without_traces_is_an_error(tmp_path: Path) -> None:
    write_trace(tmp_path / "shared" / "traces" / "a.safetensors")
    with pytest.raises(SystemExit, match="holds no attention traces"):
        locate_traces(tmp_path / "empty")


def test_without_any_the_default_models_are_captured_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captured: list[str] = []

    def capture_to_folder(model: str, folder: Path) -> list[Path]:
        captured.append(model)
        return [write_trace(folder / "captured.safetensors")]

    monkeypatch.setattr(capture_traces, "capture_to_folder", capture_to_folder)
    first = locate_traces()
    assert "no attention traces here: capturing 8192 tokens" in capsys.readouterr().err
    assert locate_traces() == first
    assert captured == ["smollm2-135m-instruct"]
    assert "measuring on traces of the default model" in capsys.readouterr().err
