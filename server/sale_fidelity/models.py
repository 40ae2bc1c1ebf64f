"""A causal LM with SALE attention and its tokenizer, for tools that measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import sale_attention.transformers_integration  # noqa: F401  registers attn_implementation="sale"
from sale_prefill_server.engine.model import LoadedModel, choose_device, wrap_module
from sale_prefill_server.engine.model import load_model as load_for_service
from sale_prefill_server.models import ModelInvalidError, resolve_model

# Rows of logits held at once: 512 of 150,000 words in float32 are 300 MB.
_LOGIT_ROWS = 512


@dataclass(frozen=True, eq=False)
class FidelityModel:
    """A model on its device, as the server loads it, and its tokenizer.

    Attributes:
        loaded: the model with `attn_implementation="sale"`, and what follows from its configuration.
        tokenizer: transformers' tokenizer of the model; None for a model that came without one.
    """

    loaded: LoadedModel
    tokenizer: Any

    @property
    def name(self) -> str:
        """Name to show."""
        return self.loaded.name

    @property
    def module(self) -> Any:
        """The causal LM."""
        return self.loaded.module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.loaded.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.loaded.kv_shape.dtype

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.loaded.kv_shape.num_layers

    @property
    def num_query_heads(self) -> int:
        """Query heads a layer."""
        return self.loaded.num_query_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads a layer."""
        return self.loaded.kv_shape.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Size of one key."""
        return self.loaded.kv_shape.head_dim

    @property
    def max_tokens(self) -> int:
        """Longest sequence the model was made for."""
        return self.loaded.max_sequence_tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added.

        Raises:
            ModelInvalidError: the model came without a tokenizer.
        """
        if self.tokenizer is None:
            raise ModelInvalidError(
                f"model {self.name!r} has no tokenizer", "Put its tokenizer files into the model's directory"
            )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def hidden_states(self, token_ids: Sequence[int]) -> Tensor:
        """The decoder's last hidden states of one prompt, run in one piece: `[tokens, hidden]`.

        Attention is what the `attention_context` around the call says.
        """
        ids = torch.tensor([list(token_ids)], device=self.device)
        hidden: Tensor = self.module.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of a few hidden states: `[rows, hidden]` -> float32 `[rows, vocabulary]`.

        Rounded to the model's dtype first, as the server's are, so that both choose the same tokens.
        """
        config = self.loaded.module.config.get_text_config(decoder=True)
        logits: Tensor = self.module.get_output_embeddings()(hidden)
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        return logits.to(torch.float32)

    def logit_pieces(self, hidden: Tensor) -> list[tuple[slice, Tensor]]:
        """Cuts `[rows, hidden]` into pieces whose logits fit memory: `(rows, hidden of these rows)`."""
        starts = range(0, hidden.shape[0], _LOGIT_ROWS)
        return [(slice(start, start + _LOGIT_ROWS), hidden[start : start + _LOGIT_ROWS]) for start in starts]


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> FidelityModel:
    """Loads what the server would: the default model's name, a directory, a .gguf file or a hub id.

    Args:
        name: as `sale_prefill_server.models.resolve_model` takes it.
        device: auto, cpu, cuda or cuda:N.
        dtype: float32, float16, bfloat16, or auto for bfloat16.
        trust_remote_code: run Python code that the model brings.
        on_progress: told, line by line, what takes time.

    Raises:
        ModelError: missing, unreadable, corrupt or unsupported.
    """
    source = resolve_model(name, on_progress=on_progress)
    loaded = load_for_service(
        source.path,
        source.name,
        device=choose_device(device),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return FidelityModel(loaded, _tokenizer(source.path, trust_remote_code))


def wrap_model(module: Any, tokenizer: Any = None, name: str = "model", path: Path = Path()) -> FidelityModel:
    """A causal LM that is in memory already; it must have `attn_implementation="sale"`."""
    return FidelityModel(wrap_module(module, path, name), tokenizer)


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):  # token ids alone can still be measured
        return None
