"""Which model a profile was made for: its shape and a digest of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Values of each weight in the digest: enough to tell any two trainings apart, quick at any size.
_SAMPLES = 16


@dataclass(frozen=True)
class ModelFingerprint:
    """A model as far as its attention is concerned.

    `weights` is a SHA-256 over the names, shapes and sixteen evenly spaced values of every parameter, rounded to
    bfloat16, so that device and element type (bfloat16, float32) do not matter where the stored values are the same;
    and over the rotary scaling where there is one, since the same weights then have other keys.
    """

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    weights: str

    @classmethod
    def of(cls, module: nn.Module) -> ModelFingerprint:
        """The fingerprint of a causal LM of transformers, weights loaded."""
        config: Any = module.config
        config = config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        return cls(
            architecture=str(config.model_type),
            layers=config.num_hidden_layers,
            query_heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary_size=config.vocab_size,
            weights=_digest_of_weights(module, _rotary_scaling(config)),
        )

    def differences(self, other: ModelFingerprint) -> list[str]:
        """What differs, as "layers 30, not 32": this one's value first."""
        return [
            f"{name} {getattr(self, name)}, not {getattr(other, name)}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]


def _rotary_scaling(config: Any) -> str:
    """The parameters of a rotary embedding that is scaled, as JSON; empty for a plain one."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    plain = parameters.get("rope_type", "default") == "default"
    return "" if plain else json.dumps(parameters, sort_keys=True, default=str)


def _digest_of_weights(module: nn.Module, rotary_scaling: str) -> str:
    digest = hashlib.sha256(rotary_scaling.encode())
    for name, weight in sorted(module.named_parameters()):
        flat = weight.detach().flatten()
        last = flat.numel() - 1
        # Whole numbers: what a float rounds to may differ from one machine to another.
        index = [last * step // (_SAMPLES - 1) for step in range(_SAMPLES)]
        sample = flat[torch.tensor(index, device=flat.device)].to(torch.bfloat16).to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
