"""SALE behind the same interface: the library's own phases, with the threshold as the knob."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from sale_attention import BlockGrid, HeadPlan, KeyCodes, KvView, LayerPolicy, QueryCodes, SaleConfig
from sale_attention.quantise import default_key_centre, quantise_key, quantise_query
from sale_attention.sampled import add_sampled
from sale_attention.select import code_products, voting_rows
from sale_attention.sink_local import row_thresholds

from ..calibration.menu import SAMPLE_STRIDE
from .cost import EstimationCost, causal_pairs
from .rule import ALWAYS, NEVER, QUERY_BLOCK, Head, Levels

# Rows whose products with all keys are made at a time: 32 MiB of int32 at 32K.
_PIECE_ROWS = 256


@dataclass(frozen=True)
class Sale:
    """Quantise, sink-local pass and estimation of `sale_attention` (arXiv 2505.24179, section 3).

    Knob: -ln tau. A block comes in where tau falls below its largest estimated Relative Attention Score, so that one
    estimation answers for all thresholds; `Levels.kept(-ln tau)` is what `select_blocks` keeps at tau, but for scores
    within float32 rounding of it.

    As calibrated profiles have it, thresholds are relative to a sample of the whole row (`sale_attention.sampled`);
    with `config.sample_stride` 0 they are the paper's, relative to sink and local keys.
    """

    query_stride: int = 1
    config: SaleConfig = field(default_factory=lambda: SaleConfig(sample_stride=SAMPLE_STRIDE))
    name: str = "SALE"

    @property
    def setting(self) -> str:
        """The query stride, and what thresholds are relative to."""
        sample = self.config.sample_stride
        return f"stride {self.query_stride}, " + (f"1 in {sample} sampled" if sample else "sink-local")

    def levels(self, head: Head) -> Levels:
        """Minus the logarithm of each block's largest Relative Attention Score."""
        if self.config.query_block != QUERY_BLOCK or self.config.code_bits != 8:
            raise ValueError(f"only query blocks of {QUERY_BLOCK} and 8-bit codes compare here, not {self.config}")
        least = self.config.sink_tokens + self.config.local_tokens
        if head.first_row < least:
            raise ValueError(f"first_row={head.first_row} is below {least}, where sink and local tokens would overlap")
        query, kv = head.query[head.first_row :][None, None], KvView(head.keys[None, None], head.keys[None, None])
        grid = BlockGrid.of(query.shape[2], head.tokens, self.config)
        centre = default_key_centre(kv, self.config)
        query_codes, key_codes = quantise_query(query, grid, self.config), quantise_key(kv, centre, self.config)
        log_sum_exp = _sink_local_log_sum_exp(head, centre[0, 0], grid)[None, None]
        if self.config.sample_stride:
            add_sampled(log_sum_exp, query_codes, key_codes, grid, self.config.sample_stride, head.scale)
        at_one = row_thresholds(log_sum_exp, query_codes, torch.zeros(1), head.scale)  # of tau = 1
        values = torch.full((grid.query_blocks, grid.key_blocks), NEVER, device=query.device)
        for rows, blocks in self._pieces(grid, head.tokens):
            values[blocks] = -_log_scores(query_codes, key_codes, at_one, rows, head.scale)
        values.masked_fill_(_always_attended(grid).to(values.device), ALWAYS)
        return Levels(values, self.config.key_block, head)

    def tau(self, knob: float) -> float:
        """The library's threshold at `knob`."""
        return math.exp(-knob)

    def _pieces(self, grid: BlockGrid, prompt_end: int) -> Iterator[tuple[Tensor, slice]]:
        """Voting rows, int64 `[blocks, votes]`, of neighbouring query blocks that have equally many."""
        policy = LayerPolicy.uniform(1, query_stride=self.query_stride)
        plan = HeadPlan.resolve(policy, self.config, prompt_end)
        index = 0
        while index < grid.query_blocks:
            votes = [list(voting_rows(grid, plan, self.query_stride, index))]
            while index + len(votes) < grid.query_blocks and (len(votes) + 1) * len(votes[0]) <= _PIECE_ROWS:
                following = list(voting_rows(grid, plan, self.query_stride, index + len(votes)))
                if len(following) != len(votes[0]):
                    break
                votes.append(following)
            yield torch.tensor(votes), slice(index, index + len(votes))
            index += len(votes)

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """Exact sink-local scores, quantising queries and keys, and 8-bit products of every `query_stride`-th row."""
        config = self.config
        local = config.sink_tokens + config.local_tokens + config.query_block / 2
        twice = 1.0 / config.sample_stride if config.sample_stride else 0.0
        return EstimationCost(
            multiply_adds=tokens * local * head_dim,
            int8_multiply_adds=causal_pairs(tokens) / self.query_stride * (1.0 + twice) * head_dim,
            element_operations=4.0 * tokens * head_dim,
        )


@lru_cache(maxsize=4)
def _always_attended(grid: BlockGrid) -> Tensor:
    """Sink and local blocks: bool `[query blocks, key blocks]`."""
    mask = torch.zeros(grid.query_blocks, grid.key_blocks, dtype=torch.bool)
    for index in range(grid.query_blocks):
        sink_end, local_start, local_end = grid.always_attended(index)
        mask[index, :sink_end] = mask[index, local_start:local_end] = True
    return mask


def _sink_local_log_sum_exp(head: Head, centre: Tensor, grid: BlockGrid) -> Tensor:
    """`sink_local.sink_local_log_sum_exp` of one head, float32 `[rows]`, in few operations, without a loop."""
    rows, block, local = grid.query_tokens, grid.query_block, grid.local_tokens
    query = torch.nn.functional.pad(head.query32[head.first_row :] * head.scale, (0, 0, 0, -rows % block))
    query = query.view(grid.query_blocks, block, -1)
    keys = head.keys32 - centre
    padded = torch.nn.functional.pad(keys[head.first_row - local :], (0, 0, 0, -rows % block))
    windows = padded.unfold(0, local + block, block)  # [query blocks, d, local + block]
    scores = torch.cat([query @ keys[: grid.sink_tokens].t(), query @ windows], dim=-1)
    future = torch.ones(block, scores.shape[-1], dtype=torch.bool, device=scores.device)
    scores.masked_fill_(future.triu_(grid.sink_tokens + local + 1), float("-inf"))
    return torch.logsumexp(scores, dim=-1).flatten()[:rows]


def _log_scores(query_codes: QueryCodes, key_codes: KeyCodes, at_one: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Largest s~ - L of each block: rows int64 `[blocks, votes]` -> float32 `[blocks, key blocks]`."""
    chosen = rows.flatten().to(at_one.device)
    keys, scales = key_codes.codes[0, 0], key_codes.scales[0, 0]
    products = code_products(query_codes.codes[0, 0, chosen], keys)
    block = -(-len(keys) // len(scales))
    padding = -len(keys) % block
    if padding:
        lowest = -(2**24)
        products = torch.nn.functional.pad(products, (0, padding), value=lowest)
    largest = products.view(len(chosen), -1, block).amax(dim=-1).to(torch.float32) * scales
    excess = largest - at_one[0, 0, chosen].unsqueeze(1)
    excess *= (query_codes.scales[0, 0, chosen] * scale).unsqueeze(1)
    return excess.view(*rows.shape, -1).amax(dim=1)
