"""Exact attention of a few sampled tiles beside what SALE computed of them: what was really kept, and what was lost.

A tile is a query block of one head in one layer. Its rows are attended to densely once more; results are not changed.
The share of the attention mass that the kept keys hold needs no list of them: it is exp(lse_kept - lse_all) of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_view import KvView

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """One head's query block that contains absolute row position `position`."""

    layer: int
    head: int
    position: int


@dataclass(frozen=True)
class TileResult:
    """A tile's rows: attention mass on kept keys, relative output errors |o - o_dense| / |o_dense|."""

    tile: Tile
    rows: int
    kept_mass: float
    least_kept_mass: float
    mean_error: float
    max_error: float


class Audit:
    """The tiles to look at in one prefill, and what was found; used from one thread.

    Args:
        tiles: which; a tile whose position no call brings stays unseen.
        query_block: rows of a tile.
    """

    def __init__(self, tiles: Iterable[Tile], query_block: int) -> None:
        self._waiting: dict[int, list[Tile]] = {}
        for tile in tiles:
            self._waiting.setdefault(tile.layer, []).append(tile)
        self._query_block = query_block
        self._found: list[tuple[Tile, int, Tensor]] = []

    def observe(self, layer: int, query: Tensor, kv: KvView, output: Tensor, lse: Tensor, scale: float) -> None:
        """Looks at this layer's tiles among the rows of one call; does not wait for the device.

        Args:
            layer: whose.
            query: `[1, H, Nq, d]`, the last positions of `kv`.
            kv: keys and values.
            output: `[1, H, Nq, d_v]`, what was computed.
            lse: float32 `[1, H, Nq]` over the keys that were attended to.
            scale: softmax scale.
        """
        try:
            self._look(layer, query, kv, output, lse, scale)
        except torch.OutOfMemoryError as error:  # an audit never ends a request
            logger.warning("layer %d is not audited, nor those after it: %s", layer, error)
            self._waiting.clear()

    def _look(self, layer: int, query: Tensor, kv: KvView, output: Tensor, lse: Tensor, scale: float) -> None:
        offset = kv.tokens - query.shape[2]
        for tile in self._waiting.get(layer, ()):
            block = tile.position // self._query_block * self._query_block
            start, end = max(block, offset), min(block + self._query_block, kv.tokens)
            if not start <= tile.position < end:
                continue
            rows = slice(start - offset, end - offset)
            kv_head = kv.kv_head(tile.head // (query.shape[1] // kv.kv_heads)).prefix(end)
            exact, all_lse = exact_attention(query[0, tile.head, rows], kv_head, scale)
            error = (output[0, tile.head, rows].float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-20)
            mass = (lse[0, tile.head, rows] - all_lse).exp().clamp(max=1.0)
            figures = torch.stack([mass.mean(), mass.min(), error.mean(), error.max()])
            self._found.append((tile, end - start, figures))

    def results(self) -> list[TileResult]:
        """What was found so far; waits for the device."""
        if not self._found:
            return []
        figures = torch.stack([found for _, _, found in self._found]).cpu().tolist()
        return [TileResult(tile, rows, *values) for (tile, rows, _), values in zip(self._found, figures, strict=True)]


def exact_attention(query: Tensor, kv: KvView, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention in float32 of rows that stand at the end of one head's keys.

    Args:
        query: `[rows, d]`.
        kv: one sequence, one KV head.
        scale: softmax scale.

    Returns:
        Outputs float32 `[rows, d_v]` and natural log-sum-exps float32 `[rows]`.
    """
    rows, tokens = query.shape[0], kv.tokens
    keys, values = kv.keys_between(0, tokens)[0, 0].float(), kv.values_between(0, tokens)[0, 0].float()
    scores = query.float() @ keys.T * scale
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    scores[:, tokens - rows :].masked_fill_(future, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(1)).exp() @ values, lse
