"""A session's KV as the cache that transformers models write to.

transformers' own paged cache (`generation.continuous_batching`) was judged and left: it belongs to one generation
manager, which frees a request's pages when its generation ends, where this service must keep KV by session, cut it
back, share it, and hand it out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sale_attention import KvView
from sale_prefill_server.kv.pool import SessionKv


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """What layers of both caches have in common: memory belongs to the pool, and there is no limit of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def get_max_length(self) -> int:
        """None."""
        return -1

    def get_max_cache_shape(self) -> int:
        """None (the name of `get_max_length` before transformers 5.20)."""
        return -1


class SessionCacheLayer(_PagedLayer):
    """One layer of a `SessionKv`: `update` appends in place and returns all pages of the pool.

    Attention reads them by the page table of its context (`sale_attention.transformers_integration`). A model with
    attention of its own gets a copy of what the layer holds instead, where the cache `gathers`.
    """

    is_croppable = True

    def __init__(self, kv: SessionKv, layer: int) -> None:
        super().__init__()
        self._kv = kv
        self._layer = layer
        self.gathers = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [1, num_kv_heads, n, head_dim]; returns K and V `[pages, num_kv_heads, page tokens, head_dim]`.

        Where it gathers: `[1, num_kv_heads, tokens, head_dim]`.
        """
        keys, values = self._kv.append(self._layer, key_states, value_states)
        if not self.gathers:
            return keys, values
        view = KvView(keys, values, self._kv.page_table, self._kv.length(self._layer)).gathered()
        return view.keys, view.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new queries see."""
        return self._kv.length(self._layer) + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._kv.length(self._layer)


class SessionCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """`transformers.Cache` over a `SessionKv`."""

    def __init__(self, kv: SessionKv) -> None:
        super().__init__(layers=[SessionCacheLayer(kv, layer) for layer in range(kv.shape.num_layers)])

    def gather(self, gathers: bool) -> None:
        """Whether the next pass gets copies in place of pages."""
        for layer in self.layers:
            layer.gathers = gathers


class StepCacheLayer(_PagedLayer):
    """One layer of a decode step whose position is on the device: `update` writes each sequence's token to its slot.

    Args:
        keys, values: the layer's pages `[pages, page tokens, num_kv_heads, head_dim]`.
        slots: int64 `[B]`, page * page tokens + token within the page.
        capacity: tokens that a sequence can have at most.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, capacity: int) -> None:
        super().__init__()
        self._keys = keys
        self._values = values
        self._slots = slots
        self._capacity = capacity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, num_kv_heads, 1, head_dim]; returns K and V `[pages, num_kv_heads, page tokens, head_dim]`."""
        for pages, states in ((self._keys, key_states), (self._values, value_states)):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self._slots, states[:, :, 0])
        return self._keys.transpose(1, 2), self._values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if the new token were the last that fits, so that no mask is built."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """See `get_mask_sizes`; the true length is on the device."""
        return self._capacity - 1
