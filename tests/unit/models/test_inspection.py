"""Whether a model can run here is told from its directory before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sale_prefill_server.models import (
    ModelInvalidError,
    ModelUnreadableError,
    ModelUnsupportedError,
    inspect_config,
)


def test_a_llama_passes_and_its_config_comes_back(model_directory: Path) -> None:
    config = inspect_config(model_directory)
    assert (config.model_type, config.num_hidden_layers, config.max_position_embeddings) == ("llama", 2, 256)


def _without_config(path: Path) -> None:
    (path / "config.json").unlink()


def _config_not_json(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama", ')


def _config_binary(path: Path) -> None:
    (path / "config.json").write_bytes(b"\xff\xfe\x00")


def _config_list(path: Path) -> None:
    (path / "config.json").write_text("[]")


def _config_wrong_values(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "many"}')


def _without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _weights_cut_short(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _shard_missing(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-00002.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, "is not a model directory: it has no config.json"),
        (_config_not_json, "config.json is not JSON"),
        (_config_binary, "config.json is not JSON"),
        (_config_list, "config.json has no model_type"),
        (_config_wrong_values, "config.json does not describe a llama"),
        (_without_weights, r"has no weights: no \*.safetensors"),
        (_weights_cut_short, "model.safetensors is corrupt or cut short"),
        (_shard_missing, "lacks weight files model-00002.safetensors"),
    ],
)
def test_a_damaged_directory_is_invalid(damage: Callable[[Path], None], message: str, model_directory: Path) -> None:
    damage(model_directory)
    with pytest.raises(ModelInvalidError, match=message) as caught:
        inspect_config(model_directory)
    assert caught.value.reason == "MODEL_INVALID"
    assert str(model_directory) in str(caught.value)


def test_a_config_that_cannot_be_read_is_unreadable(model_directory: Path) -> None:
    (model_directory / "config.json").unlink()
    (model_directory / "config.json").mkdir()
    with pytest.raises(ModelUnreadableError, match="Is a directory") as caught:
        inspect_config(model_directory)
    assert caught.value.reason == "MODEL_UNREADABLE"


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        ({"model_type": "t5"}, "'t5' is not a causal language model"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
        ({"model_type": "bart"}, "'bart' is an encoder-decoder"),
        ({"model_type": "bert"}, "'bert' is an encoder"),
        ({"model_type": "bloom"}, "'bloom' does not attend through transformers' attention interface"),
        ({"model_type": "mamba"}, "'mamba' does not attend through transformers' attention interface"),
        ({"model_type": "deepseek_v3"}, r"'deepseek_v3' keeps a latent .*\(kv_lora_rank\)"),
        ({"model_type": "gemma2"}, r"'gemma2' caps its attention scores \(attn_logit_softcapping = 50.0\)"),
        ({"model_type": "gpt_oss"}, "'gpt_oss' adds learned sinks"),
        ({"model_type": "gemma3_text"}, r"do not attend to the whole context \(sliding_attention\)"),
        ({"model_type": "mistral", "sliding_window": 4096}, r"whole context \(sliding_window = 4096\)"),
        ({"model_type": "warp_drive"}, "'warp_drive' is not known to transformers"),
        (
            {"model_type": "warp_drive", "auto_map": {"AutoModelForCausalLM": "modeling_warp.Warp"}},
            "'warp_drive' needs Python code that the model brings, which is off",
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_an_architecture_that_cannot_run_here_is_named(config: dict[str, Any], obstacle: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnsupportedError, match=obstacle) as caught:
        inspect_config(tmp_path)
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    assert "Llama" in caught.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False},
        {"model_type": "qwen3"},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "phi3", "sliding_window": 262144, "max_position_embeddings": 131072, "pad_token_id": 0},
    ],
    ids=lambda config: config["model_type"],
)
def test_the_families_of_plain_decoders_pass(config: dict[str, Any], model_directory: Path) -> None:
    (model_directory / "config.json").write_text(json.dumps(config))
    assert inspect_config(model_directory).model_type == config["model_type"]
