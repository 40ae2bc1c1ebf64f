"""A profile file: what is written is read again, and what cannot be right is refused with the field named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sale_attention import SaleConfig
from sale_attention.fingerprint import ModelFingerprint
from sale_attention.profile import (
    Geometry,
    HeadMeasure,
    HeadSetting,
    Level,
    Profile,
    ProfileError,
    dumps_profile,
    load_profile,
    loads_profile,
    save_profile,
)

FINGERPRINT = ModelFingerprint("llama", 2, 4, 2, 8, 320, "ab" * 32)


def level(budget: float, tau: float) -> Level:
    heads = (
        HeadSetting("sparse", tau, 2),
        HeadSetting("streaming"),
        HeadSetting("dense"),
        HeadSetting("sparse", 2 * tau, 1),
    )
    measures = (HeadMeasure(0.25, 0.01, 0.1),) * 4
    return Level(budget, (heads,) * 2, (measures,) * 2, 0.25, 0.01, 0.1, 0.5)


PROFILE = Profile(
    name="tiny",
    fingerprint=FINGERPRINT,
    geometry=Geometry.of(SaleConfig()),
    method="budget",
    text={"documents": ["a"], "tokens": 512},
    key_centres=torch.linspace(-1, 1, 2 * 2 * 8).view(2, 2, 8) / 3,
    levels=(level(0.01, 0.004), level(0.02, 0.016)),
    default_level=1,
    created_with={"sale-prefill": "0.1.0"},
)


def changed(change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(dumps_profile(PROFILE))
    change(data)
    return json.dumps(data)


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path / "profile.json")
    loaded = load_profile(tmp_path / "profile.json")
    assert loaded == PROFILE
    assert torch.equal(loaded.key_centres, PROFILE.key_centres)
    assert loaded.digest == PROFILE.digest
    assert list(tmp_path.iterdir()) == [tmp_path / "profile.json"]


def test_policies_say_what_every_head_does() -> None:
    first, second = PROFILE.policies(0)
    assert first.tau.tolist() == pytest.approx([0.004, math.inf, 0.0, 0.008])
    assert first.query_stride.tolist() == [2, 1, 1, 1]
    assert torch.equal(second.key_centre, PROFILE.key_centres[1])
    assert PROFILE.policies()[0].tau[0] == pytest.approx(0.016)


@pytest.mark.parametrize(("budget", "expected"), [(0.005, None), (0.01, 0), (0.019, 0), (0.02, 1), (5.0, 1)])
def test_the_level_is_the_largest_within_the_budget(budget: float, expected: int | None) -> None:
    assert PROFILE.level_for(budget) == expected


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("format", lambda data: data.update(format="something else")),
        ("version", lambda data: data.update(version=1)),
        ("version", lambda data: data.update(version=True)),
        ("levels[0].settings[1][3][1] (tau) = NaN", lambda data: _set(data, 1, 3, [1], math.nan)),
        ("levels[0].settings[1][3][1] (tau) = Infinity", lambda data: _set(data, 1, 3, [1], math.inf)),
        ("levels[0].settings[0][0][1] (tau) = -0.1", lambda data: _set(data, 0, 0, [1], -0.1)),
        ("levels[0].settings[0][0][1] (tau) = 0", lambda data: _set(data, 0, 0, [1], 0)),
        ("levels[0].settings[0][2][1] (tau)", lambda data: _set(data, 0, 2, [1], 0.1)),
        ("levels[0].settings[0][0][0]", lambda data: _set(data, 0, 0, [0], "lazy")),
        ("levels[0].settings[0][0][2] (query_stride) = 3", lambda data: _set(data, 0, 0, [2], 3)),
        ("levels[0].settings[1]: 3 heads, must be 4", lambda data: data["levels"][0]["settings"][1].pop()),
        ("levels[1].measures: 1 layers, must be 2", lambda data: data["levels"][1]["measures"].pop()),
        ("levels[0].measures[0][0][0] (density) = 1.5", lambda data: _measure(data, 1.5)),
        ("levels[0].error_budget", lambda data: data["levels"][0].update(error_budget=-1)),
        ("levels[0].error_budget: missing", lambda data: data["levels"][0].pop("error_budget")),
        ("levels: error budgets", lambda data: data["levels"].reverse()),
        ("levels", lambda data: data.update(levels=[])),
        ("default_level = 2", lambda data: data.update(default_level=2)),
        ("key_centres[0][1]: 7 values, must be 8", lambda data: data["key_centres"][0][1].pop()),
        ("key_centres[1][0][0] = NaN", lambda data: data["key_centres"][1][0].__setitem__(0, math.nan)),
        ("key_centres: missing", lambda data: data.pop("key_centres")),
        ("geometry.query_block=96", lambda data: data["geometry"].update(query_block=96)),
        ("fingerprint.layers", lambda data: data["fingerprint"].update(layers="two")),
        ("fingerprint.layers", lambda data: data["fingerprint"].update(layers=-2)),
        ("method", lambda data: data.update(method="guess")),
        ("levels[0].settings: changed after calibration", lambda data: _set(data, 0, 0, [1], 0.005)),
        ("levels[1].density: changed after calibration", lambda data: data["levels"][1].update(density=0.26)),
        ("name: changed after calibration", lambda data: data.update(name="another")),
        ("remark: changed after calibration", lambda data: data.update(remark="tuned by hand")),
        ("name, default_level: changed", lambda data: data.update(name="another", default_level=0)),
        ("checksum: changed after calibration", lambda data: data.update(checksum="0" * 64)),
        ("checksum: changed after calibration", lambda data: (data.pop("checksums"), data.update(name="another"))),
        ("key_centres[0][0][0] = 1000000", lambda data: data["key_centres"][0][0].__setitem__(0, 10**400)),
        ("levels[0].p99_error = 1000000", lambda data: data["levels"][0].update(p99_error=10**400)),
        ("checksum: missing", lambda data: data.pop("checksum")),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(field: str, change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(ProfileError) as refused:
        loads_profile(changed(change))
    assert str(refused.value).startswith(field)


def _set(data: dict[str, Any], layer: int, head: int, where: list[int], value: object) -> None:
    data["levels"][0]["settings"][layer][head][where[0]] = value


def _measure(data: dict[str, Any], density: float) -> None:
    data["levels"][0]["measures"][0][0][0] = density


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    text, path = dumps_profile(PROFILE), tmp_path / "short.json"
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(ProfileError, match=r"short.json: not whole JSON, line \d+.*calibrate again"):
        load_profile(path)


def test_no_file_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file or directory; check the path"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match=r"bytes\.json"):
        load_profile(tmp_path / "bytes.json")
    with pytest.raises(ProfileError, match="the file: must be an object"):
        loads_profile("[]")


def test_another_model_is_refused_with_what_differs() -> None:
    PROFILE.check_fits(FINGERPRINT)
    with pytest.raises(ProfileError, match=r"^fingerprint: .*layers 2, not 3; weights abab.*sale-prefill calibrate"):
        PROFILE.check_fits(replace(FINGERPRINT, layers=3, weights="cd" * 32))


@pytest.fixture(scope="module")
def module(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)


def test_a_fingerprint_does_not_depend_on_the_element_type(module: torch.nn.Module) -> None:
    expected = ModelFingerprint.of(module)
    assert ModelFingerprint.of(module.float()) == expected
    assert (expected.layers, expected.query_heads) == (2, 4)


def test_a_fingerprint_notices_one_changed_weight(module: torch.nn.Module) -> None:
    expected = ModelFingerprint.of(module)
    weight = next(module.parameters())
    with torch.no_grad():
        weight[0, 0] += 1
    assert ModelFingerprint.of(module).differences(expected)[0].startswith("weights")
    with torch.no_grad():
        weight[0, 0] -= 1


def test_a_fingerprint_tells_scaled_rotary_embeddings_apart(module: torch.nn.Module) -> None:
    plain = ModelFingerprint.of(module)
    before = module.config.rope_parameters
    module.config.rope_parameters = {**before, "rope_type": "linear", "factor": 4.0}
    try:
        scaled = ModelFingerprint.of(module)
    finally:
        module.config.rope_parameters = before
    assert scaled.differences(plain)[0].startswith("weights")
    assert ModelFingerprint.of(module) == plain


def test_geometry_leaves_the_query_block_to_the_backend() -> None:
    geometry = Geometry(query_block=64, key_block=32, sink_tokens=64, local_tokens=256, code_bits=8, sample_stride=32)
    applied = geometry.applied_to(SaleConfig(query_block=128, dense_rows=2048))
    assert applied == SaleConfig(query_block=128, sink_tokens=64, local_tokens=256, dense_rows=2048, sample_stride=32)
