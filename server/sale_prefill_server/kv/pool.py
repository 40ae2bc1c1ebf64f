"""KV storage of sessions within a byte budget.

A session's KV is one [1, num_kv_heads, capacity, head_dim] tensor a layer for K and one for V, appended in place.
Bytes are accounted by capacity and return to the budget when the last holder lets go.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

#: Capacities are multiples of this: a whole number of SALE key blocks (32) and query blocks (64, 128).
CAPACITY_STEP_TOKENS = 128


@dataclass(frozen=True)
class KvShape:
    """What one token's KV looks like in this model.

    `head_dim` is that of keys and of values; `dtype` and `device` are the model's.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that K and V of all layers take for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KvCapacityError(Exception):
    """The pool cannot hold that much more. Carries both numbers, in bytes."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes of KV needed, {free_bytes} free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class KvPool:
    """Hands out `SessionKv` within `capacity_bytes`. Thread-safe."""

    def __init__(self, shape: KvShape, capacity_bytes: int) -> None:
        self.shape = shape
        self.capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes that live `SessionKv` hold."""
        return self._used_bytes

    def create(self) -> SessionKv:
        """An empty KV cache; the caller owns its one reference."""
        return SessionKv(self)

    def _take(self, needed_bytes: int) -> None:
        with self._lock:
            free_bytes = self.capacity_bytes - self._used_bytes
            if needed_bytes > free_bytes:
                raise KvCapacityError(needed_bytes, free_bytes)
            self._used_bytes += needed_bytes

    def _give_back(self, freed_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= freed_bytes


class SessionKv:
    """KV of one session.

    One thread writes (`append`, `buffers`, `truncate`); others may read tokens below a length that they saw while
    holding a reference: an append never touches those, and a move to a larger buffer leaves the old one to its readers.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._references = 1
        self._lock = threading.Lock()
        self._reserved_tokens = 0
        self._lengths = [0] * pool.shape.num_layers
        self._moves = 0
        empty = self._allocate(0)
        self._keys = [empty] * pool.shape.num_layers
        self._values = [empty] * pool.shape.num_layers

    @property
    def shape(self) -> KvShape:
        """Geometry of the model's KV."""
        return self._pool.shape

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is complete in all layers."""
        return self._lengths[-1]

    @property
    def size_bytes(self) -> int:
        """Bytes taken from the pool."""
        return self._reserved_tokens * self.shape.bytes_per_token

    @property
    def moves(self) -> int:
        """How often memory has moved: addresses seen at an equal count are still good."""
        return self._moves

    def length(self, layer: int) -> int:
        """Tokens that one layer holds; within a step, earlier layers are ahead."""
        return self._lengths[layer]

    def reserve(self, num_tokens: int) -> None:
        """Takes room for `num_tokens` in all from the pool; never shrinks. Memory itself is touched by `append`.

        Raises:
            KvCapacityError: over the pool's budget; nothing has changed then.
        """
        wanted = -(-num_tokens // CAPACITY_STEP_TOKENS) * CAPACITY_STEP_TOKENS
        with self._lock:
            if wanted > self._reserved_tokens:
                self._pool._take((wanted - self._reserved_tokens) * self.shape.bytes_per_token)
                self._reserved_tokens = wanted

    def _allocate(self, num_tokens: int) -> torch.Tensor:
        shape = self.shape
        return torch.empty((1, shape.num_kv_heads, num_tokens, shape.head_dim), dtype=shape.dtype, device=shape.device)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [1, num_kv_heads, n, head_dim] to one layer and returns views of all that it holds now.

        Raises:
            ValueError: past what was reserved.
        """
        start = self._lengths[layer]
        end = start + keys.shape[2]
        self._make_room(layer, end)
        self._keys[layer][:, :, start:end] = keys
        self._values[layer][:, :, start:end] = values
        self._lengths[layer] = end
        return self.view(layer, end)

    def make_room(self, num_tokens: int) -> None:
        """Gives every layer memory for `num_tokens`, as `append` does for its own; for a writer to `buffers`.

        Raises:
            ValueError: past what was reserved.
        """
        for layer in range(self.shape.num_layers):
            self._make_room(layer, num_tokens)

    def buffers(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's K and V [1, num_kv_heads, capacity, head_dim], for the one thread that writes.

        They are good until `moves` counts on. What it writes behind the length counts by `extend_to`.
        """
        return self._keys[layer], self._values[layer]

    def extend_to(self, num_tokens: int) -> None:
        """Counts tokens that were written to the `buffers` of all layers."""
        self._lengths = [num_tokens] * self.shape.num_layers

    def _make_room(self, layer: int, num_tokens: int) -> None:
        if num_tokens > self._reserved_tokens:
            raise ValueError(
                f"layer {layer}: {num_tokens} tokens do not fit the {self._reserved_tokens} reserved; call reserve"
            )
        if num_tokens > self._keys[layer].shape[2]:
            self._grow(layer, self._lengths[layer])

    def _grow(self, layer: int, kept_tokens: int) -> None:
        # One layer at a time, so that old and new exist together for one layer only; both or, without memory, neither.
        grown = []
        for tensors in (self._keys, self._values):
            larger = self._allocate(self._reserved_tokens)
            larger[:, :, :kept_tokens] = tensors[layer][:, :, :kept_tokens]
            grown.append(larger)
        self._moves += 1
        self._keys[layer], self._values[layer] = grown

    def view(self, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [1, num_kv_heads, num_tokens, head_dim] of one layer's K and V."""
        return self._keys[layer][:, :, :num_tokens], self._values[layer][:, :, :num_tokens]

    def segments(self, layer: int, kind: int, start: int, end: int) -> list[torch.Tensor]:
        """Tokens [start, end) of one layer's K (`kind` 0) or V (1), as views [n, num_kv_heads, head_dim] in order."""
        return [(self._keys, self._values)[kind][layer][0, :, start:end].transpose(0, 1)]

    def write(self, layer: int, kind: int, start: int, values: torch.Tensor) -> None:
        """Puts [n, num_kv_heads, head_dim], on any device, at tokens from `start` on; `extend_to` counts them.

        Raises:
            ValueError: past what was reserved.
        """
        self._make_room(layer, start + values.shape[0])
        (self._keys, self._values)[kind][layer][0, :, start : start + values.shape[0]] = values.transpose(0, 1)

    def truncate(self, num_tokens: int) -> None:
        """Forgets tokens from `num_tokens` on, in every layer."""
        self._lengths = [min(length, num_tokens) for length in self._lengths]

    def acquire(self) -> SessionKv:
        """One more reference, for a reader; pair it with `release`."""
        with self._lock:
            if self._references == 0:
                raise ValueError("KV cache was freed already; look the session up again")
            self._references += 1
        return self

    def release(self) -> None:
        """Drops one reference; the last one frees the memory."""
        with self._lock:
            self._references -= 1
            if self._references:
                return
            freed_bytes, self._reserved_tokens = self.size_bytes, 0
            self._keys.clear()
            self._values.clear()
        self._pool._give_back(freed_bytes)
