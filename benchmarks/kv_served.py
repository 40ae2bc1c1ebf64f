"""A server process with KV of some shape and random bytes in it, and nothing else to do: a model with much KV and
little of anything else, and a session that was pushed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.served import ServedModel, serving
from sale_prefill_client import Client, KvCache

VOCABULARY = 320
PAGE_TOKENS = 128
SESSION = "served"
_LEASE_SECONDS = 3600.0


@dataclass(frozen=True)
class KvSize:
    """A session's KV, bfloat16; the defaults are 4K tokens of an 8B model (Llama 3.1): 512 MiB."""

    layers: int = 32
    heads: int = 8
    head_dim: int = 128
    tokens: int = 4096

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return 2 * self.layers * self.tokens * self.heads * self.head_dim * 2

    @property
    def shape(self) -> tuple[int, ...]:
        """As a KvCache has it, THD."""
        return self.layers, 2, self.tokens, self.heads, self.head_dim

    @property
    def token_ids(self) -> list[int]:
        """What the KV is of."""
        return [token % VOCABULARY for token in range(self.tokens)]

    def random_bytes(self, seed: int = 0) -> npt.NDArray[np.uint8]:
        """Flat."""
        return np.random.default_rng(seed).integers(0, 256, self.total_bytes, dtype=np.uint8)

    def cache(self, client: Client, flat: npt.NDArray[np.uint8]) -> KvCache:
        """The bytes as KV of the client's server; shares their memory."""
        spec = client.get_server_info().kv_spec
        assert spec is not None
        return KvCache.from_numpy(flat.view(np.uint16).reshape(self.shape), spec, token_ids=self.token_ids)

    def model_config(self) -> Any:
        """Of a Llama with such KV."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16 * self.heads,
            intermediate_size=64,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.head_dim,
            max_position_embeddings=2 * self.tokens,
        )


@contextmanager
def kv_server(
    size: KvSize, content: npt.NDArray[np.uint8], *arguments: str, fragmented: bool = False
) -> Iterator[ServedModel]:
    """A server whose session `SESSION` has `content`.

    Args:
        size: shape of the KV; the pool has room for the session three times.
        content: flat.
        arguments: of `sale-prefill serve`.
        fragmented: no two pages of the session follow each other in the pool.
    """
    import torch
    from transformers import AutoModelForCausalLM

    pool_bytes = 5 * size.total_bytes  # key codes take half as much again
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(size.model_config(), dtype=torch.bfloat16).save_pretrained(directory)
        given = ("--model", directory, "--profile", "none", "--kv-memory", str(pool_bytes), *arguments)
        with serving(*given) as served:
            if fragmented:
                _fragment(served.client, size)
            served.client.push_kv(size.cache(served.client, content), session_id=SESSION, lease_seconds=_LEASE_SECONDS)
            yield served


def _fragment(client: Client, size: KvSize) -> None:
    """Takes every other page of the pool's beginning for sessions of one page."""
    pages = size.tokens // PAGE_TOKENS
    sessions = []
    for number in range(2 * pages):
        prompt = [number % VOCABULARY, number // VOCABULARY, *range(PAGE_TOKENS - 2)]
        sessions.append(client.prefill(prompt, lease_seconds=_LEASE_SECONDS).session_id)
    for session_id in sessions[::2]:
        client.delete_session(session_id)
