"""A session's KV as the cache that transformers models write to.

transformers' own paged cache (`generation.continuous_batching`) was judged and left: it belongs to one generation
manager, which frees a request's pages when its generation ends, where this service must keep KV by session, cut it
back, and hand it out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sale_prefill_server.kv.pool import SessionKv


class SessionCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer's view of a `SessionKv`: `update` appends in place and returns views of everything held."""

    is_croppable = True

    def __init__(self, kv: SessionKv, layer: int) -> None:
        super().__init__()
        self._kv = kv
        self._layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory belongs to the pool."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [1, num_kv_heads, n, head_dim]; returns K and V [1, num_kv_heads, length, head_dim]."""
        return self._kv.append(self._layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new queries see."""
        return self._kv.length(self._layer) + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._kv.length(self._layer)

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit of its own (the name of `get_max_length` before transformers 5.20)."""
        return -1


class SessionCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """`transformers.Cache` over a `SessionKv`."""

    def __init__(self, kv: SessionKv) -> None:
        super().__init__(layers=[SessionCacheLayer(kv, layer) for layer in range(kv.shape.num_layers)])
