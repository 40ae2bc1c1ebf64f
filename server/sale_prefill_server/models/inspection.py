"""Whether a model directory can run here, told from its small files, before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sale_prefill_server.models.errors import (
    ModelInvalidError,
    ModelUnreadableError,
    ModelUnsupportedError,
)

_WHOLE_COPY = "Point to a whole Hugging Face model directory, or fetch it again"
_OTHER_MODEL = "Choose a decoder-only model such as Llama, Mistral, Qwen2, Qwen3 or Phi-3"


def inspect_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The `transformers.PreTrainedConfig` of the model directory `path`, once it is known to run here.

    Runs here: a causal decoder whose layers all attend through transformers' attention interface with plain softmax
    over the whole context. Weights are checked for presence and length, not read.

    Args:
        path: a Hugging Face model directory.
        trust_remote_code: run the Python code that the directory brings for an architecture of its own.

    Raises:
        ModelUnreadableError: a file cannot be read.
        ModelInvalidError: no config.json, a corrupt one, or weights missing or cut short.
        ModelUnsupportedError: an architecture that cannot run here.
    """
    raw = _read_config(path)
    config, model_class = _classes(path, raw, trust_remote_code)
    _check_architecture(path, config, model_class)
    _check_weights(path)
    return config


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ModelInvalidError(f"{path} is not a model directory: it has no config.json", _WHOLE_COPY) from error
    except OSError as error:
        raise ModelUnreadableError(f"{file}: {error.strerror}", "Check its type and permissions") from error
    except ValueError as error:
        raise ModelInvalidError(f"{file} is not JSON: {error}", _WHOLE_COPY) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelInvalidError(f"{file} has no model_type", _WHOLE_COPY)
    return raw


def _classes(path: Path, raw: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    model_type = raw["model_type"]
    own_code = raw.get("auto_map") or {}
    if model_type not in CONFIG_MAPPING and not (own_code and trust_remote_code):
        detail, remedy = "is not known to transformers", _OTHER_MODEL
        if own_code:
            detail = "needs Python code that the model brings, which is off"
            remedy = f"{_OTHER_MODEL}, or say --trust-remote-code if you have read that code"
        raise ModelUnsupportedError(f"{path}: architecture {model_type!r} {detail}", remedy)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes raise whatever nonsense values lead to
        raise ModelInvalidError(
            f"{path / 'config.json'} does not describe a {model_type}: {error}", _WHOLE_COPY
        ) from error
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return config, found[0] if isinstance(found, tuple) else found
    if trust_remote_code and "AutoModelForCausalLM" in own_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return config, get_class_from_dynamic_module(own_code["AutoModelForCausalLM"], str(path))
    raise ModelUnsupportedError(f"{path}: architecture {model_type!r} is not a causal language model", _OTHER_MODEL)


def _check_architecture(path: Path, config: Any, model_class: Any) -> None:
    text = config.get_text_config(decoder=True)
    obstacle = _obstacle(text, model_class)
    if obstacle:
        raise ModelUnsupportedError(f"{path}: architecture {config.model_type!r} {obstacle}", _OTHER_MODEL)


def _obstacle(config: Any, model_class: Any) -> str | None:
    """What in this architecture SALE attention cannot express, or None."""
    if config.is_encoder_decoder:
        return "is an encoder-decoder"
    if getattr(config, "is_decoder", True) is False:
        return "is an encoder: it attends in both directions"
    if not model_class._supports_attention_backend:
        return "does not attend through transformers' attention interface"
    if getattr(config, "kv_lora_rank", None):
        return "keeps a latent in place of keys and values (kv_lora_rank)"
    if getattr(config, "attn_logit_softcapping", None):
        return f"caps its attention scores (attn_logit_softcapping = {config.attn_logit_softcapping})"
    if config.model_type == "gpt_oss":
        return "adds learned sinks to its softmax"
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "layer_types", None) is None and _uses_window(config)
    if other_layers or (windowed and window < config.max_position_embeddings):
        kinds = ", ".join(sorted(other_layers)) or f"sliding_window = {window}"
        return f"has layers that do not attend to the whole context ({kinds})"
    return None


def _uses_window(config: Any) -> bool:
    return bool(getattr(config, "use_sliding_window", True))


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelInvalidError(f"{index} cannot be read: {error}", _WHOLE_COPY) from error
    missing = sorted(name for name in names if not (path / name).exists())
    if missing:
        raise ModelInvalidError(f"{path} lacks weight files {', '.join(missing)}", _WHOLE_COPY)
    shards = [path / name for name in sorted(names)] or sorted(path.glob("*.safetensors"))
    if not shards and not any(path.glob("*.bin")):
        raise ModelInvalidError(f"{path} has no weights: no *.safetensors and no *.bin file", _WHOLE_COPY)
    for shard in shards:
        _check_shard(shard)


def _check_shard(shard: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="np"):  # reads the header and compares it with the file's length
            pass
    except SafetensorError as error:
        raise ModelInvalidError(f"{shard} is corrupt or cut short: {error}", _WHOLE_COPY) from error
    except OSError as error:
        raise ModelUnreadableError(f"{shard}: {error.strerror or error}", "Check its permissions") from error
