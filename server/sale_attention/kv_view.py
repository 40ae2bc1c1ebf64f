"""Keys and values as the backends see them: one contiguous tensor each, or pages and a page table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_UNIT_TOKENS = 32


@dataclass(frozen=True, eq=False)
class KvView:
    """A read-only view of one layer's keys and values; it never copies on construction.

    Attributes:
        keys: `[B, Hkv, Nk, d]`, or with a page table `[pages, Hkv, page_tokens, d]`; any strides.
        values: the same layout, `[..., d_v]`.
        page_table: int64 `[B, pages per sequence]` or None; entry p of a row holds tokens
            `[p * page_tokens, (p + 1) * page_tokens)` of that sequence. `page_tokens` is a multiple of 32, so a key
            block never straddles two pages.
        length: tokens in use; None means all of a contiguous view. Required with a page table.

    Raises:
        ValueError: where shapes, dtypes, devices, page size or length do not fit, naming both sides.
    """

    keys: Tensor
    values: Tensor
    page_table: Tensor | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if self.keys.ndim != 4 or self.values.ndim != 4 or self.keys.shape[:3] != self.values.shape[:3]:
            raise ValueError(
                f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} must both be "
                f"[batch, kv heads, tokens, head_dim] (or pages) and agree in the first three"
            )
        if self.keys.dtype != self.values.dtype or self.keys.device != self.values.device:
            raise ValueError(
                f"keys are {self.keys.dtype} on {self.keys.device}, values {self.values.dtype} on "
                f"{self.values.device}; they must agree"
            )
        capacity = self.keys.shape[2]
        if self.page_table is not None:
            capacity = self._check_pages(self.page_table)
        elif self.length is None:
            object.__setattr__(self, "length", capacity)
        if not 0 < self.tokens <= capacity:
            raise ValueError(f"length={self.length} must lie in 1 .. {capacity}, what keys and values can hold")

    def _check_pages(self, page_table: Tensor) -> int:
        page_tokens = self.keys.shape[2]
        if page_tokens % PAGE_UNIT_TOKENS:
            raise ValueError(f"pages of {page_tokens} tokens: a page must be a multiple of {PAGE_UNIT_TOKENS} tokens")
        if page_table.ndim != 2 or page_table.dtype != torch.int64:
            raise ValueError(
                f"page_table is {page_table.dtype} {tuple(page_table.shape)}; it must be int64 [batch, pages]"
            )
        if self.length is None:
            raise ValueError("a paged KvView needs length=, the tokens in use")
        return page_table.shape[1] * page_tokens

    @property
    def batch(self) -> int:
        """Sequences."""
        return (self.keys if self.page_table is None else self.page_table).shape[0]

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.keys.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in use, Nk."""
        assert self.length is not None
        return self.length

    @property
    def head_dim(self) -> int:
        """Size of one key."""
        return self.keys.shape[3]

    @property
    def value_dim(self) -> int:
        """Size of one value."""
        return self.values.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        """Device of keys and values."""
        return self.keys.device

    def prefix(self, tokens: int) -> KvView:
        """The first `tokens` tokens of this view."""
        return KvView(self.keys, self.values, self.page_table, tokens)

    def kv_head(self, head: int) -> KvView:
        """The view of one KV head, which keeps its dimension."""
        chosen = slice(head, head + 1)
        return KvView(self.keys[:, chosen], self.values[:, chosen], self.page_table, self.length)

    def keys_between(self, start: int, end: int) -> Tensor:
        """Keys of positions `[start, end)`: `[B, Hkv, end - start, d]`, a view where not paged."""
        return self._between(self.keys, start, end)

    def values_between(self, start: int, end: int) -> Tensor:
        """Values of positions `[start, end)`: `[B, Hkv, end - start, d_v]`, a view where not paged."""
        return self._between(self.values, start, end)

    def _between(self, source: Tensor, start: int, end: int) -> Tensor:
        if self.page_table is None:
            return source[:, :, start:end]
        page_tokens = source.shape[2]
        first = start // page_tokens
        table = self.page_table[:, first : -(-end // page_tokens)]
        # [B, pages, Hkv, page_tokens, d] -> [B, Hkv, tokens, d]
        pages = source[table].transpose(1, 2).flatten(2, 3)
        return pages[:, :, start - first * page_tokens : end - first * page_tokens]

    def gathered(self) -> KvView:
        """This view without page table: itself where contiguous, else a copy with the pages in order."""
        if self.page_table is None:
            return self
        return KvView(self.keys_between(0, self.tokens), self.values_between(0, self.tokens))
