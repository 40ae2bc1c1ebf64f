"""Which model a profile was made for: its shape and a digest of its weights."""

from __future__ import annotations

import hashlib
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
    bfloat16, so that device and element type do not matter where the stored values are the same.
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
            weights=_digest_of_weights(module),
        )

    def differences(self, other: ModelFingerprint) -> list[str]:
        """What differs, as "layers 30, not 32": this one's value first."""
        return [
            f"{name} {getattr(self, name)}, not {getattr(other, name)}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]


def _digest_of_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        flat = weight.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        sample = flat[index.to(flat.device)].to(torch.bfloat16).to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
