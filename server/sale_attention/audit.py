"""Exact attention of a few sampled tiles beside what SALE computed of them: what was really kept, and what was lost.

A tile is a query block of one head in one layer. Its rows are attended to densely once more; results are not changed.
The share of the attention mass that the kept keys hold needs no list of them: it is exp(lse_kept - lse_all) of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .kv_view import KvView

logger = logging.getLogger(__name__)

#: Errors above this, and outputs that are not finite where dense attention's are, count as this.
LARGEST_ERROR = 10.0
# Keys at a time, so that scratch memory does not grow with them.
_KEY_PIECE = 8192


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

    Tiles of one layer at one position are computed together: on a GPU they cost hardly more than one of them. Where
    the device has no memory for that, nothing more is looked at: an audit never ends a request.

    Args:
        tiles: which; a tile whose position no call brings stays unseen.
        query_block: rows of a tile.
    """

    def __init__(self, tiles: Iterable[Tile], query_block: int) -> None:
        self.tiles = tuple(tiles)
        self._waiting: dict[int, dict[int, list[Tile]]] = {}
        for tile in self.tiles:
            self._waiting.setdefault(tile.layer, {}).setdefault(tile.position, []).append(tile)
        self._query_block = query_block
        self._found: list[_Found] = []

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
        except torch.OutOfMemoryError as error:
            logger.warning("layer %d is not audited, nor those after it: %s", layer, error)
            self._waiting.clear()

    def _look(self, layer: int, query: Tensor, kv: KvView, output: Tensor, lse: Tensor, scale: float) -> None:
        offset, group = kv.tokens - query.shape[2], query.shape[1] // kv.kv_heads
        for position, tiles in self._waiting.get(layer, {}).items():
            block = position // self._query_block * self._query_block
            start, end = max(block, offset), min(block + self._query_block, kv.tokens)
            if not start <= position < end:
                continue
            rows = slice(start - offset, end - offset)
            # Stacked views: an index tensor would have to be sent to the device.
            queries, outputs, kept_lse = (
                torch.stack([tensor[0, tile.head, rows] for tile in tiles]) for tensor in (query, output, lse)
            )
            kv_heads = [tile.head // group for tile in tiles]
            exact, exact_lse = exact_attention(queries, kv.prefix(end), kv_heads, scale)
            self._found.append(_Found(tiles, end - start, outputs, kept_lse, exact, exact_lse))

    def results(self) -> list[TileResult]:
        """What was found so far; waits for the device."""
        results = []
        # All layers at once: dozens of small operations that a GPU would else do for each.
        for rows in sorted({found.rows for found in self._found}, reverse=True):
            alike = [found for found in self._found if found.rows == rows]
            columns = ([getattr(found, name) for found in alike] for name in ("output", "lse", "exact", "exact_lse"))
            figures = _figures(*(torch.cat(column) for column in columns)).cpu().tolist()
            tiles = [tile for found in alike for tile in found.tiles]
            results += [TileResult(tile, rows, *values) for tile, values in zip(tiles, figures, strict=True)]
        return results


@dataclass(frozen=True, eq=False)
class _Found:
    """Tiles of one layer at one position: outputs `[tiles, rows, d_v]`, log-sum-exps `[tiles, rows]`; kept, exact."""

    tiles: list[Tile]
    rows: int
    output: Tensor
    lse: Tensor
    exact: Tensor
    exact_lse: Tensor


def _figures(output: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor) -> Tensor:
    """Kept mass (mean, least) and error (mean, largest) by tile: float32 `[tiles, 4]`, finite.

    Where dense attention is not finite either, nothing was lost: SALE shows what cannot be judged.
    """
    error = (output.to(exact.dtype) - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-20)
    error = error.nan_to_num(nan=LARGEST_ERROR).clamp(max=LARGEST_ERROR)
    mass = (lse - exact_lse).exp().nan_to_num(nan=0.0).clamp(max=1.0)
    judged = exact.isfinite().all(dim=-1) & exact_lse.isfinite()
    error, mass = error.where(judged, 0.0), mass.where(judged, 1.0)
    return torch.stack([mass.mean(-1), mass.amin(-1), error.mean(-1), error.amax(-1)], dim=-1).float()


def exact_attention(query: Tensor, kv: KvView, kv_heads: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of some rows of some heads, in float32 (float64 of float64), in pieces of the keys.

    Args:
        query: `[heads, rows, d]`, the last positions of `kv`.
        kv: keys and values; the first sequence counts.
        kv_heads: one a query head: the KV head that it reads.
        scale: softmax scale.

    Returns:
        Outputs `[heads, rows, d_v]` and natural log-sum-exps `[heads, rows]`.
    """
    rows, tokens = query.shape[1], kv.tokens
    work = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(work) * scale
    # Cut before the rows' own positions, so that every row sees a key of every piece.
    cuts = [*range(0, max(1, tokens - rows), _KEY_PIECE), tokens]
    parts = []
    for start, end in pairwise(cuts):
        keys, values = (
            torch.stack([part[0, head] for head in kv_heads]).to(work)
            for part in (kv.keys_between(start, end), kv.values_between(start, end))
        )
        scores = scaled @ keys.mT
        if end == tokens:
            future = torch.ones(rows, end - start, dtype=torch.bool, device=query.device)
            scores.masked_fill_(future.triu(tokens - rows - start + 1), float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        # The largest weight is 1 / sum(exp(s - max)).
        parts.append((weights @ values, scores.amax(dim=-1) - weights.amax(dim=-1).log()))
    if len(parts) == 1:
        return parts[0]
    outputs, sums = (torch.stack(column) for column in zip(*parts, strict=True))
    lse = sums.logsumexp(dim=0)
    return (outputs * (sums - lse).exp().unsqueeze(-1)).sum(dim=0), lse
