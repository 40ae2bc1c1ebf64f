"""Inputs of a case, made on the CPU, and what the reference and float64 make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sale_attention import BlockGrid, HeadPlan, KeyCodes, KvView, LayerPolicy, QueryCodes, Selection
from sale_attention.quantise import default_key_centre, quantise_key, quantise_query, query_block_means
from sale_attention.sampled import add_sampled, sampled_positions
from sale_attention.select import select_blocks
from sale_attention.sink_local import row_thresholds, sink_local_log_sum_exp
from tests.conformance.cases import Case
from tests.unit.attention.naive import attended, causal_mask, exact_attention


@dataclass(frozen=True, eq=False)
class Inputs:
    """Query `[B, H, Nq, d]`, keys and values `[B, Hkv, Nk, ...]`, float64; a centre where not the keys' own mean."""

    query: Tensor
    keys: Tensor
    values: Tensor
    centre: Tensor | None = None


def attention_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Text that keeps returning to a few subjects: rows match their own passage, and others on the same subject.

    Strengths scatter, so that blocks come close to the threshold from both sides. Some rows match one key far away, and
    keys have a large constant part, as trained models' keys do.
    """

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def uniform(*size: int) -> Tensor:
        return 0.5 + torch.rand(*size, 1, generator=generator, dtype=torch.float64) * 0.7

    passage, subjects, dim = 40, 40, case.head_dim
    group, heads = case.heads // case.kv_heads, (case.batch, case.kv_heads)
    meanings = normal(*heads, subjects, dim) * (3 / dim**0.25)
    passages = torch.randint(subjects, (*heads, case.tokens // passage + 1), generator=generator)
    subject = passages.repeat_interleave(passage, dim=2)[:, :, : case.tokens]

    def meaning(subject: Tensor) -> Tensor:
        chosen: Tensor = meanings.gather(2, subject.unsqueeze(3).expand(-1, -1, -1, dim))
        return chosen

    constant = normal(*heads, 1, dim) * 1.5
    keys = meaning(subject) * uniform(*subject.shape) + normal(*subject.shape, dim) * 0.7 + constant
    queries = []
    for _ in range(group):
        own = subject[:, :, case.offset :]
        elsewhere = torch.randint(subjects, own.shape, generator=generator)
        wanders = torch.rand(own.shape, generator=generator) < 0.003
        wanted = torch.where(wanders, elsewhere, own)
        queries.append(meaning(wanted) * uniform(*own.shape) + normal(*own.shape, dim) * 0.5)
    query = torch.stack(queries, dim=2).flatten(1, 2)
    for _ in range(max(1, case.rows // 50)):
        row, head = (int(torch.randint(n, (), generator=generator)) for n in (case.rows, case.heads))
        key = int(torch.randint(case.offset + row + 1, (), generator=generator))
        keys[:, head // group, key] = query[:, head, row] * 1.2 + constant[:, head // group, 0]
    values = normal(*heads, case.tokens, case.value_dim or dim)
    if case.config.code_bits == 4:
        # Eighths, so that the correction of centred queries is exact in whatever order its products are summed.
        query, keys = ((tensor * 8).round().clamp(-48, 48) / 8 for tensor in (query, keys))
    return Inputs(query, keys, values)


def peaked_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Scores so far apart that nearly all weight falls on one key, and most weights underflow."""
    inputs = attention_inputs(case, generator)
    return Inputs(inputs.query * 6, inputs.keys, inputs.values)


def tied_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Exact scales, and elements that are multiples of half a scale: ties for the rounding.

    Scales are powers of two, in float32 also small multiples of them, whose reciprocals are not exact.
    """

    def halves(heads: int, tokens: int) -> Tensor:
        size = (case.batch, heads, tokens, case.head_dim)
        return torch.randint(-254, 255, size, generator=generator).to(torch.float64) / 2

    def factors(groups: int) -> Tensor:
        odd = torch.randint(4, (groups, 1), generator=generator) * 2 + 1
        return odd.double() if case.dtype == torch.float32 else torch.ones(groups, 1, dtype=torch.float64)

    query, keys = halves(case.heads, case.rows), halves(case.kv_heads, case.tokens)
    query[..., 0] = 127
    keys[:, :, ::32, 0] = -127
    query *= factors(case.rows) * 2.0 ** torch.randint(-10, -7, (case.rows, 1), generator=generator)
    keys *= factors(case.tokens // 32 + 1).repeat_interleave(32, dim=0)[: case.tokens]
    centre = torch.full((case.batch, case.kv_heads, case.head_dim), 1 / 16)
    values = torch.randn(*keys.shape[:3], case.value_dim or case.head_dim, generator=generator, dtype=torch.float64)
    return Inputs(query, (keys + 1) / 16, values, centre)


def blank_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Rows of zeros, key blocks that equal the centre, and others below the smallest normal number."""
    inputs = attention_inputs(case, generator)
    inputs.query[:, :, ::5] = 0
    inputs.query[:, :, 1::5] *= 1e-38
    inputs.keys[:, :, 96:160] = 0
    inputs.keys[:, :, 192:224] *= 1e-39
    return Inputs(inputs.query, inputs.keys, inputs.values, torch.zeros(case.batch, case.kv_heads, case.head_dim))


def faint_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """One key far above all others, each of which weighs less beside it than float32 resolves; together they count."""
    query = torch.zeros(case.batch, case.heads, case.rows, case.head_dim, dtype=torch.float64)
    keys, values = (
        torch.randn(case.batch, case.kv_heads, case.tokens, dim, generator=generator, dtype=torch.float64)
        for dim in (case.head_dim, case.value_dim or case.head_dim)
    )
    query[..., 0] = case.head_dim**0.5
    keys[..., 0] = 0
    keys[:, :, 5, 0] = 17.5
    return Inputs(query, keys, values + 1)


INPUTS: dict[str, Callable[[Case, torch.Generator], Inputs]] = {
    "attention": attention_inputs,
    "peaked": peaked_inputs,
    "ties": tied_inputs,
    "blank": blank_inputs,
    "faint": faint_inputs,
}


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one call on the CPU: in float64, and by torch in the case's own precision.

    Attributes:
        exact: float64 `[B, H, Nq, d_v]`.
        exact_lse: float64 `[B, H, Nq]`.
        by_torch: what SDPA makes in the case's dtype from the same mask, as float64 `[B, H, Nq, d_v]`.
        rounding: float64 `[B, H, Nq]`, how far the row moves when each score and each weight is rounded once: scores
            by the precision of the sum of magnitudes that they are made of. Zero for 16-bit dtypes, where the
            roundings are many and torch's error is no matter of luck.
    """

    exact: Tensor
    exact_lse: Tensor
    by_torch: Tensor
    rounding: Tensor


class Problem:
    """A case made concrete, and the reference's result of each phase, computed when first asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        inputs = INPUTS[case.inputs](case, torch.Generator().manual_seed(case.seed))
        self.query = inputs.query.to(case.dtype)
        self.kv = KvView(inputs.keys.to(case.dtype), inputs.values.to(case.dtype))
        self.scale = 1.0 / math.sqrt(case.head_dim)
        self.grid = BlockGrid.of(case.rows, case.tokens, case.config)
        self.policy: LayerPolicy = case.policy
        self.plan = HeadPlan.resolve(
            self.policy, case.config, case.tokens if case.prompt_end is None else case.prompt_end
        )
        self.centre = default_key_centre(self.kv, case.config) if inputs.centre is None else inputs.centre
        if case.config.code_bits == 4:
            self.centre = (self.centre * 8).round() / 8
        self._attention: dict[bytes, Attention] = {}

    @cached_property
    def query_codes(self) -> QueryCodes:
        """The reference's; with 4-bit codes around means in eighths, like the inputs."""
        means = None
        if self.case.config.code_bits == 4:
            means = (query_block_means(self.query, self.grid) * 8).round() / 8
        return quantise_query(self.query, self.grid, self.case.config, means)

    @cached_property
    def key_codes(self) -> KeyCodes:
        """The reference's, contiguous, of exactly the keys."""
        return quantise_key(self.kv, self.centre, self.case.config)

    @cached_property
    def thresholds(self) -> Tensor:
        """By row, from the reference's log-sum-exp."""
        lse = sink_local_log_sum_exp(self.query, self.kv, self.centre, self.grid, self.scale)
        if self.case.config.sample_stride:
            add_sampled(lse, self.query_codes, self.key_codes, self.grid, self.case.config.sample_stride, self.scale)
        return row_thresholds(lse, self.query_codes, self.policy.log_tau(), self.scale)

    @cached_property
    def selection(self) -> Selection:
        """The reference's."""
        return select_blocks(self.query_codes, self.key_codes, self.thresholds, self.plan, self.grid, self.kv)

    @cached_property
    def sink_local_lse(self) -> Tensor:
        """Log-sum-exp of centred sink and local scores in float64 `[B, H, Nq]`."""
        nothing = torch.zeros_like(self.selection.mask())
        mask = torch.from_numpy(attended(nothing.numpy(), self.case, self.case.config))
        centred = KvView(self.kv.keys.double() - self.centre.double().unsqueeze(2), self.kv.values.double())
        return exact_attention(self.query, centred, mask, self.scale)[1]

    @cached_property
    def sampled_lse(self) -> Tensor:
        """`sink_local_lse` with the sample, of the reference's codes, in float64 `[B, H, Nq]`."""
        result = self.sink_local_lse.clone()
        group, stride = self.case.heads // self.case.kv_heads, self.case.config.sample_stride
        keys = (
            self.key_codes.codes.double()
            * self.key_codes.scales.double().repeat_interleave(32, 2)[:, :, : self.case.tokens, None]
        )
        scores = self.query_codes.codes.double() @ keys.repeat_interleave(group, dim=1).transpose(2, 3)
        scores *= self.query_codes.scales.double().unsqueeze(3) * self.scale
        for index in range(self.grid.query_blocks):
            rows, chosen = slice(*self.grid.rows(index)), list(sampled_positions(self.grid, index, stride))
            far = scores[:, :, rows, chosen].logsumexp(dim=-1) + math.log(stride)
            result[:, :, rows] = torch.logaddexp(result[:, :, rows], far)
        return result

    @cached_property
    def selected(self) -> Attention:
        """Attention to the reference's selection, sink and local blocks."""
        return self.attention(torch.from_numpy(attended(self.selection.mask().numpy(), self.case, self.case.config)))

    @cached_property
    def everything(self) -> Attention:
        """Attention to all keys that causality allows."""
        shape = (self.case.batch, self.case.heads, self.case.rows, self.case.tokens)
        return self.attention(causal_mask(self.case).expand(shape))

    def attention(self, mask: Tensor) -> Attention:
        """Attention under a mask bool `[B, H, Nq, Nk]`; kept, since most backends select the same."""
        key = mask.numpy().tobytes()
        if key not in self._attention:
            self._attention[key] = self._attention_under(mask)
        return self._attention[key]

    def _attention_under(self, mask: Tensor) -> Attention:
        exact, exact_lse = exact_attention(self.query, self.kv, mask, self.scale)
        group = self.case.heads // self.case.kv_heads
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (self.kv.keys, self.kv.values))
        by_torch = scaled_dot_product_attention(self.query, keys, values, attn_mask=mask, scale=self.scale)
        rounding = torch.zeros(exact_lse.shape, dtype=torch.float64)
        if self.case.dtype in (torch.float32, torch.float64):
            query, keys, values = self.query.double(), keys.double(), values.double()
            scores = (query @ keys.transpose(2, 3)) * self.scale
            weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
            magnitudes = (query.abs() @ keys.abs().transpose(2, 3)) * self.scale
            squared = (values * values).sum(-1).unsqueeze(2)
            distances = squared - 2 * exact @ values.transpose(2, 3) + (exact * exact).sum(-1, keepdim=True)
            by_scores = ((weights * magnitudes) ** 2 * distances.clamp(min=0)).sum(-1).sqrt()
            by_weights = (weights @ values.abs()).norm(dim=-1)
            rounding = torch.finfo(self.case.dtype).eps * (by_scores + by_weights)
        return Attention(exact, exact_lse, by_torch.double(), rounding)

    def selectable_blocks(self) -> Tensor:
        """bool `[H, query blocks, key blocks]`: what the selection decides about."""
        chosen = torch.zeros(self.case.heads, self.grid.query_blocks, self.grid.key_blocks, dtype=torch.bool)
        for head in range(self.case.heads):
            for index in range(self.grid.query_blocks if self.plan.strides[head] else 0):
                start, end = self.grid.selectable(index)
                chosen[head, index, start:end] = True
        return chosen


@cache
def problem(case: Case) -> Problem:
    """The problem of `case`, kept, so that its expected results are made once for all backends."""
    return Problem(case)
