"""Exact attention of a few sampled tiles beside what SALE computed of them: what was really kept, and what was lost.

A tile is a query block of one head in one layer. Its rows are attended to densely once more; results are not changed.
The share of the attention mass that the kept keys hold needs no list of them: it is exp(lse_kept - lse_all) of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
        self._found: list[tuple[list[Tile], int, Tensor]] = []

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
            exact, all_lse = exact_attention(queries, kv.prefix(end), [tile.head // group for tile in tiles], scale)
            figures = _figures(outputs.to(exact.dtype), kept_lse, exact, all_lse)
            self._found.append((tiles, end - start, figures))

    def results(self) -> list[TileResult]:
        """What was found so far; waits for the device."""
        if not self._found:
            return []
        figures = torch.cat([found for _, _, found in self._found]).cpu().tolist()
        seen = [(tile, rows) for tiles, rows, _ in self._found for tile in tiles]
        return [TileResult(tile, rows, *values) for (tile, rows), values in zip(seen, figures, strict=True)]


def _figures(output: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor) -> Tensor:
    """Kept mass (mean, least) and error (mean, largest) by tile: float32 `[tiles, 4]`, finite.

    Where dense attention is not finite either, nothing was lost: SALE shows what cannot be judged.
    """
    error = (output - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-20)
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
    heads, rows, _ = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    scaled, first = query.to(work) * scale, kv.tokens - rows
    output, lse = scaled.new_zeros(heads, rows, kv.value_dim), scaled.new_full((heads, rows, 1), float("-inf"))
    for start in range(0, kv.tokens, _KEY_PIECE):
        end = min(start + _KEY_PIECE, kv.tokens)
        keys, values = (
            torch.stack([part[0, head] for head in kv_heads]).to(work)
            for part in (kv.keys_between(start, end), kv.values_between(start, end))
        )
        scores = scaled @ keys.mT
        if end > first:
            positions = torch.arange(first, kv.tokens, device=query.device).unsqueeze(1)
            scores.masked_fill_(torch.arange(start, end, device=query.device) > positions, float("-inf"))
        joint = torch.logaddexp(lse, scores.logsumexp(dim=-1, keepdim=True))
        output = output * (lse - joint).exp() + (scores - joint).exp() @ values
        lse = joint
    return output, lse.squeeze(-1)
