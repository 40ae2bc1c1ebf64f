"""What each setting of each head costs and does, on sampled query blocks of one layer of one prompt.

The work is done once for all settings: estimated block maxima are compared with every threshold, and exact attention is
summed by key block, so that the output under any mask of blocks is one product. Arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sale_attention import BlockGrid, KvView, SaleConfig
from sale_attention.config import HeadPlan
from sale_attention.quantise import quantise_key, quantise_query
from sale_attention.sampled import add_sampled
from sale_attention.select import block_estimates, voting_rows
from sale_attention.sink_local import row_thresholds, sink_local_log_sum_exp

from .capture import LayerCapture
from .menu import Menu

# Relative row errors are counted in 32 bins a decade; quantiles are interpolated within one.
_BINS_A_DECADE = 32
_LOWEST_DECADE, _HIGHEST_DECADE = -5, 1
ERROR_BINS = _BINS_A_DECADE * (_HIGHEST_DECADE - _LOWEST_DECADE)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Sums over sampled rows; those of several prompts are added. H heads, E settings of a menu, on the CPU.

    A row's error is |o - o_dense| / |o_dense|, delta = o - o_dense, g the gradient of `capture`.

    Attributes:
        rows: int64 `[]`, sampled rows.
        causal_blocks: int64 `[]`, key blocks that dense attention of these rows visits.
        computed_blocks: int64 `[H, E]`, key blocks that each setting visits.
        error: float64 `[H, E]`, sum of errors.
        squared_error: float64 `[H, E]`, sum of squared errors.
        effect: float64 `[H, E]`, sum of (g . delta)^2: twice the divergence of predictions, in nats.
        histogram: int64 `[H, E, ERROR_BINS]`, errors counted by size.
    """

    rows: Tensor
    causal_blocks: Tensor
    computed_blocks: Tensor
    error: Tensor
    squared_error: Tensor
    effect: Tensor
    histogram: Tensor

    @classmethod
    def zero(cls, heads: int, settings: int) -> Measurement:
        """Of no rows."""
        count = torch.zeros((), dtype=torch.int64)
        sums = torch.zeros(heads, settings, dtype=torch.float64)
        computed = torch.zeros(heads, settings, dtype=torch.int64)
        histogram = torch.zeros(heads, settings, ERROR_BINS, dtype=torch.int64)
        return cls(count, count, computed, sums, sums, sums, histogram)

    def __add__(self, other: Measurement) -> Measurement:
        return Measurement(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def density(self) -> Tensor:
        """float64 `[H, E]`, share of causal blocks visited."""
        return self.computed_blocks / self.causal_blocks

    def mean_error(self) -> Tensor:
        """float64 `[H, E]`."""
        return self.error / self.rows

    def p99_error(self) -> Tensor:
        """float64 `[H, E]`."""
        return quantile(self.histogram, 0.99)


def quantile(histogram: Tensor, share: float) -> Tensor:
    """The error that `share` of rows stay below: counts `[..., ERROR_BINS]` -> float64 `[...]`."""
    counts = histogram.to(torch.float64)
    cumulative = counts.cumsum(dim=-1)
    wanted = share * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, wanted).clamp_(max=ERROR_BINS - 1)
    before = cumulative.gather(-1, index) - counts.gather(-1, index)
    inside = (wanted - before) / counts.gather(-1, index).clamp(min=1.0)
    decades = (index + inside) / _BINS_A_DECADE + _LOWEST_DECADE
    return torch.where(index == 0, 0.0, 10.0**decades).squeeze(-1)


def error_sizes() -> Tensor:
    """The middle of every bin that errors are counted in, float64 `[ERROR_BINS]`."""
    return 10.0 ** ((torch.arange(ERROR_BINS, dtype=torch.float64) + 0.5) / _BINS_A_DECADE + _LOWEST_DECADE)


def count_errors(errors: Tensor) -> Tensor:
    """Errors `[..., rows]` counted by size: int64 `[..., ERROR_BINS]`; the first bin holds all that is smaller."""
    bins = ((errors.clamp(min=1e-30).log10() - _LOWEST_DECADE) * _BINS_A_DECADE).floor()
    bins = bins.clamp_(0, ERROR_BINS - 1).to(torch.int64)
    counts = torch.zeros(*errors.shape[:-1], ERROR_BINS, dtype=torch.int64, device=errors.device)
    return counts.scatter_add_(-1, bins, torch.ones_like(bins))


def sampled_blocks(tokens: int, config: SaleConfig, count: int, phase: float = 0.5) -> list[int]:
    """At most `count` query blocks of a prompt, spread evenly over its sparse rows; the last one among them.

    Args:
        tokens: length of the prompt.
        config: block geometry.
        count: how many.
        phase: in [0, 1), where in its stretch each sample lies.
    """
    first, end = config.dense_rows // config.query_block, -(-tokens // config.query_block)
    if end - first <= count:
        return list(range(first, end))
    return [first + int((index + phase) * (end - first) / count) for index in range(count - 1)] + [end - 1]


@torch.no_grad()
def measure_layer(
    capture: LayerCapture, centre: Tensor, config: SaleConfig, menu: Menu, blocks: Sequence[int]
) -> Measurement:
    """Measures every setting of `menu` but dense on the query blocks `blocks` of one layer.

    Args:
        capture: the layer's attention on one prompt; without gradient, effects are 0.
        centre: float32 `[Hkv, d]`, subtracted from keys before they are quantised.
        config: block geometry and code width.
        menu: settings.
        blocks: indices of query blocks at or past `config.dense_rows`.
    """
    layer = _Layer(capture, centre, config, menu)
    total = Measurement.zero(layer.heads, menu.measured)
    for index in blocks:
        total = total + layer.block(index)
    return total


class _Layer:
    """One layer of one prompt."""

    def __init__(self, capture: LayerCapture, centre: Tensor, config: SaleConfig, menu: Menu) -> None:
        self.capture, self.config, self.menu = capture, config, menu
        # Without gradient the effects come out as 0.
        self.gradient = torch.zeros_like(capture.output) if capture.gradient is None else capture.gradient
        self.heads, self.tokens = capture.query.shape[1:3]
        self.kv_heads = capture.keys.shape[1]
        self.grid = BlockGrid.of(self.tokens, self.tokens, config)
        self.centre = centre.to(capture.keys.device).unsqueeze(0)
        self.codes = quantise_key(KvView(capture.keys, capture.values), self.centre, config)
        tail_start = max(0, self.tokens - config.unstrided_tail_tokens)
        unstrided_from = tail_start // config.query_block * config.query_block
        self.plan = HeadPlan(strides=(), dense=(), unstrided_from=unstrided_from)

    def block(self, index: int) -> Measurement:
        """One query block."""
        start, end = self.grid.rows(index)
        kept = self._kept_blocks(index)
        group = self.heads // self.kv_heads
        parts = []
        for kv_head in range(self.kv_heads):
            members = slice(kv_head * group, (kv_head + 1) * group)
            parts.append(self._errors(kv_head, members, slice(start, end), kept[members]))
        sums = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        rows, causal = torch.tensor(end - start), torch.tensor(self.grid.causal_end(index))
        return Measurement(rows, causal, kept.sum(dim=-1).cpu(), *sums)

    def _kept_blocks(self, index: int) -> Tensor:
        """bool `[H, E, key blocks]`: what each setting visits, sink and local blocks included."""
        start, end = self.grid.rows(index)
        query = self.capture.query[:, :, start:end]
        kv = KvView(self.capture.keys, self.capture.values, length=end)
        rows = BlockGrid.of(end - start, end, self.config)
        codes = quantise_query(query, rows, self.config)
        sums = sink_local_log_sum_exp(query, kv, self.centre, rows, self.capture.scale)
        if self.config.sample_stride:
            add_sampled(sums, codes, self.codes, rows, self.config.sample_stride, self.capture.scale)
        thresholds = []
        for tau in self.menu.taus:
            log_tau = torch.full((self.heads,), tau, dtype=torch.float64).log().to(torch.float32)
            thresholds.append(row_thresholds(sums, codes, log_tau, self.capture.scale)[0])
        bound = torch.stack(thresholds, dim=1).unsqueeze(3)  # [H, taus, rows, 1]
        by_head = [block_estimates(codes, self.codes, rows, kv, 0, head) for head in range(self.kv_heads)]
        passed = ~(torch.cat(by_head).unsqueeze(1) <= bound)
        sink_end, local_start, local_end = self.grid.always_attended(index)
        shape = (self.heads, self.menu.measured, local_end)
        kept = torch.zeros(shape, dtype=torch.bool, device=passed.device)
        kept[..., :sink_end] = True
        kept[..., local_start:] = True
        first, last = self.grid.selectable(index)
        for place, stride in enumerate(self.menu.strides):
            votes = voting_rows(self.grid, self.plan, stride, index)
            chosen = passed[:, :, votes.start - start : votes.stop - start : votes.step].any(dim=2)
            settings = slice(place * len(self.menu.taus), (place + 1) * len(self.menu.taus))
            kept[:, settings, first:last] = chosen
        return kept

    def _errors(self, kv_head: int, members: slice, rows: slice, kept: Tensor) -> tuple[Tensor, ...]:
        """Sums of one KV head's query heads over some rows, as in `Measurement`, from `kept [heads, E, blocks]`."""
        weights, values = self._by_key_block(kv_head, members, rows)  # [h, R, n], [n, h, R, d_v]
        heads, count, value_dim = weights.shape[0], weights.shape[1], values.shape[3]
        dense = values.sum(dim=0) / weights.sum(dim=2, keepdim=True)
        norm = dense.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        gradient = self.gradient[0, rows, members].transpose(0, 1).to(torch.float32)
        columns = []
        for head in range(heads):
            mask = kept[head].to(torch.float32)
            total = (mask @ weights[head].t()).clamp(min=torch.finfo(torch.float32).tiny)
            output = (mask @ values[:, head].flatten(1)).view(-1, count, value_dim) / total.unsqueeze(2)
            delta = output - dense[head]
            error = delta.norm(dim=-1) / norm[head]  # [E, R]
            effect = (delta * gradient[head]).sum(dim=-1).to(torch.float64)
            exact = error.to(torch.float64)
            columns.append((exact.sum(1), (exact**2).sum(1), (effect**2).sum(1), count_errors(error)))
        return tuple(torch.stack(column) for column in zip(*columns, strict=True))

    def _by_key_block(self, kv_head: int, members: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Softmax weights and weighted values of some rows, summed by key block, to a common factor a row.

        Returns:
            float32 `[heads, rows, key blocks]` and `[key blocks, heads, rows, d_v]`.
        """
        size = self.grid.key_block
        padding = (0, 0, 0, -rows.stop % size)
        pad = torch.nn.functional.pad
        keys = pad(self.capture.keys[0, kv_head, : rows.stop].to(torch.float32), padding)
        values = pad(self.capture.values[0, kv_head, : rows.stop].to(torch.float32), padding)
        query = self.capture.query[0, members, rows].to(torch.float32) * self.capture.scale
        scores = query @ keys.t()
        positions = torch.arange(rows.start, rows.stop, device=scores.device).unsqueeze(1)
        scores.masked_fill_(torch.arange(keys.shape[0], device=scores.device) > positions, float("-inf"))
        weights = torch.exp_(scores.sub_(scores.amax(dim=-1, keepdim=True)))
        blocks = weights.view(*weights.shape[:2], -1, size)
        weighted = blocks.flatten(0, 1).transpose(0, 1) @ values.view(-1, size, values.shape[1])
        return blocks.sum(dim=-1), weighted.view(weighted.shape[0], *weights.shape[:2], -1)
