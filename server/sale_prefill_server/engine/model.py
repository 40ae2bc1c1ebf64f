"""Loading a Hugging Face causal LM, and what the rest of the service must know of it."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.models import ModelInvalidError, ModelUnsupportedError, inspect_config

logger = logging.getLogger(__name__)

#: Rotary scalings whose frequencies change with the sequence length: KV computed early would not fit KV computed late.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
#: Values of each weight that enter the fingerprint: enough to tell any two trainings apart, quick at any size.
_FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM on its device and the facts that follow from it.

    `fingerprint` identifies weights, precision and the configuration that shapes KV; `rope_fingerprint` the rotary
    parameters alone.
    """

    module: Any
    name: str
    path: Path
    kv_shape: KvShape
    num_query_heads: int
    vocabulary_size: int
    max_sequence_tokens: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    rope_fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.kv_shape.device


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU.

    Raises:
        ModelUnsupportedError: a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelUnsupportedError(f"device {name!r} cannot be used: {error}", "Try --device auto") from error
    return device


def load_model(
    path: Path, name: str, *, device: torch.device, dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Loads the model in `path` with the `sale` attention of `sale_attention.transformers_integration`.

    Args:
        path: model directory, as `models.resolve_model` gives it.
        name: name to show.
        device: where to put the weights.
        dtype: float32, float16, bfloat16, or auto for bfloat16.
        trust_remote_code: run Python code that the directory brings.

    Raises:
        ModelError: missing, unreadable, corrupt or unsupported.
    """
    inspect_config(path, trust_remote_code=trust_remote_code)
    element_type = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    try:
        module = AutoModelForCausalLM.from_pretrained(
            path, dtype=element_type, attn_implementation="sale", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelInvalidError(
            f"model {str(path)!r} cannot be loaded: {error}", "Check that its weight files are whole"
        ) from error
    return wrap_module(module.to(device), path, name)


def wrap_module(module: Any, path: Path, name: str) -> LoadedModel:
    """A causal LM that is on its device already, with what follows from its configuration and weights.

    Args:
        module: with `attn_implementation="sale"`; set to inference here.
        path: directory of its tokenizer files; it may have none.
        name: name to show.
    """
    module.eval().requires_grad_(False)
    text_config = module.config.get_text_config(decoder=True)
    weight = module.get_input_embeddings().weight
    return LoadedModel(
        module=module,
        name=name,
        path=path,
        kv_shape=_kv_shape(text_config, weight.dtype, weight.device),
        num_query_heads=text_config.num_attention_heads,
        vocabulary_size=module.get_input_embeddings().num_embeddings,
        max_sequence_tokens=_context_tokens(text_config),
        eos_token_ids=_eos_token_ids(module),
        fingerprint=_fingerprint(module, text_config, weight.dtype),
        rope_fingerprint=_digest(_rope_parameters(text_config)),
    )


def _kv_shape(config: Any, dtype: torch.dtype, device: torch.device) -> KvShape:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return KvShape(config.num_hidden_layers, num_kv_heads, head_dim, dtype, device)


def _rope_parameters(config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"theta": getattr(config, "rope_theta", None), **parameters}


def _context_tokens(config: Any) -> int:
    rope = _rope_parameters(config)
    kind = rope.get("rope_type", "default")
    context: int = config.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind in _LENGTH_DEPENDENT_ROPE:
        limit = original or context
        if limit < context:
            logger.warning(
                "rotary scaling %r changes with the length of the sequence, so KV cannot be kept across it: "
                "the context is limited to %d of %d tokens",
                kind,
                limit,
                context,
            )
        return int(limit)
    return context


def _eos_token_ids(module: Any) -> tuple[int, ...]:
    generation = getattr(module, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(module.config, "eos_token_id", None)
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _fingerprint(module: Any, config: Any, dtype: torch.dtype) -> str:
    shape_of_kv = [config.model_type, config.num_hidden_layers, str(dtype), _rope_parameters(config)]
    digest = hashlib.sha256(_digest(shape_of_kv).encode())
    for name, weight in sorted(module.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _FINGERPRINT_SAMPLES)][:_FINGERPRINT_SAMPLES]
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.to(device="cpu", dtype=torch.float64).numpy().tobytes())
    return digest.hexdigest()
