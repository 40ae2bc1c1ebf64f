"""Checks of the phases one after the other, each on what the one before it made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sale_attention import AttentionBackend, KeyCodes, KvView, QueryCodes, Selection
from sale_attention.reference import ReferenceBackend
from sale_attention.select import voting_rows
from sale_attention.sink_local import row_thresholds
from tests.conformance.cases import Case
from tests.conformance.compare import QUERY_AXES, require_equal, where
from tests.conformance.inputs import Problem, problem
from tests.conformance.layout import (
    CODE_POISON,
    KEY_BLOCK,
    GuardedResults,
    Layout,
    empty_key_codes,
    moved_key_codes,
    placed_kv,
    placed_query,
)

#: Share of block decisions that may differ end to end, and how far from its threshold each of them may lie.
DIFFERING_SHARE = 1e-4
DIFFERING_NATS = 1e-3


def check_end_to_end(
    backend: AttentionBackend,
    cases: Sequence[Case],
    device: str = "cpu",
    inputs_of: Callable[[Case], Problem] = problem,
) -> None:
    """From the same queries and keys, nearly the same selection: see `DIFFERING_SHARE` and `DIFFERING_NATS`."""
    decisions = differing = 0
    for case in cases:
        inputs, place = inputs_of(case), where(backend, case)
        expected = _run_phases(ReferenceBackend(), inputs, "cpu")
        result = _run_phases(backend, inputs, device)
        decisions += int(inputs.selectable_blocks().sum()) * case.batch
        places = (result.selection.mask().cpu() != expected.selection.mask()).nonzero().tolist()
        differing += len(places)
        for batch, head, index, block in places:
            margin = _margin(inputs, expected, batch, head, index, block)
            assert abs(margin) <= DIFFERING_NATS, (
                f"{place}: the decision about batch {batch}, head {head}, query block {index}, key block {block} "
                f"differs, though its estimate lies {margin:.2e} nats from the threshold"
            )
    assert differing <= DIFFERING_SHARE * decisions, (
        f"{backend.description}: {differing} of {decisions} block decisions differ end to end, allowed "
        f"{DIFFERING_SHARE * decisions:.1f}"
    )


@dataclass(frozen=True, eq=False)
class _Phases:
    query_codes: QueryCodes
    key_codes: KeyCodes
    thresholds: Tensor
    selection: Selection
    output: Tensor
    lse: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {
            "query codes": self.query_codes.codes,
            "query scales": self.query_codes.scales,
            "key codes": self.key_codes.codes,
            "key scales": self.key_codes.scales,
            "thresholds": self.thresholds,
            "mask words": self.selection.words,
            "outputs": self.output,
            "lse": self.lse,
        }


def _run_phases(
    backend: AttentionBackend,
    inputs: Problem,
    device: str,
    kv: KvView | None = None,
    key_codes: KeyCodes | None = None,
) -> _Phases:
    """One phase after the other, each from what the one before it made."""
    query, grid, scale, config = placed_query(inputs, device), inputs.grid, inputs.scale, inputs.case.config
    kv = placed_kv(inputs, device) if kv is None else kv
    key_codes = moved_key_codes(empty_key_codes(inputs), device) if key_codes is None else key_codes
    backend.quantise_key_range(kv, config, 0, key_codes)
    query_codes = backend.quantise_query(query, grid, config)
    lse = backend.sink_local_lse(query, kv, inputs.centre.to(device), grid, scale)
    if config.sample_stride:
        backend.add_sampled(lse, query_codes, key_codes, inputs.plan, grid, config.sample_stride, scale)
    thresholds = row_thresholds(lse, query_codes, inputs.policy.log_tau(), scale)
    selection = backend.select(query_codes, key_codes, thresholds, inputs.plan, grid, kv)
    results = GuardedResults(inputs, device)
    backend.compute(query, kv, selection, inputs.plan, grid, scale, results.output, results.lse)
    return _Phases(query_codes, key_codes, thresholds, selection, results.output, results.lse)


def _margin(inputs: Problem, phases: _Phases, batch: int, head: int, index: int, block: int) -> float:
    """By how many nats the best inspected row's estimate exceeds its threshold."""
    case = inputs.case
    kv_head = head * case.kv_heads // case.heads
    votes = list(voting_rows(inputs.grid, inputs.plan, inputs.plan.strides[head], index))
    tokens = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
    keys = phases.key_codes.gathered(case.tokens)
    query_codes, thresholds = phases.query_codes, phases.thresholds[batch, head, votes].double()
    products = query_codes.codes[batch, head, votes].double() @ keys.codes[batch, kv_head, tokens].double().t()
    query_scales, key_scale = query_codes.scales[batch, head, votes].double(), keys.scales[batch, kv_head, block]
    if query_codes.block_means is None:
        excess = (products.amax(dim=1) * key_scale - thresholds) * query_scales
    else:
        centred = inputs.kv.keys[batch, kv_head, tokens].double() - keys.centre[batch, kv_head].double()
        corrections = centred @ query_codes.block_means[batch, head, index].double()
        estimates = products * (query_scales.unsqueeze(1) * key_scale) + corrections
        excess = estimates.amax(dim=1) - thresholds
    return torch.max(excess).item() * inputs.scale


def check_threads(backend: AttentionBackend, case: Case) -> None:
    """One, two and three threads of a CPU backend give the same bits in every phase."""
    inputs, before = problem(case), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            everything = GuardedResults(inputs, "cpu")
            backend.attend_all(
                placed_query(inputs, "cpu"),
                placed_kv(inputs, "cpu"),
                inputs.grid,
                inputs.scale,
                everything.output,
                everything.lse,
            )
            phases = _run_phases(backend, inputs, "cpu").tensors()
            results.append({**phases, "dense outputs": everything.output, "dense lse": everything.lse})
    finally:
        torch.set_num_threads(before)
    for count, result in zip((2, 3), results[1:], strict=True):
        for name, tensor in result.items():
            axes = tuple(f"dimension {index}" for index in range(tensor.ndim))
            require_equal(f"{where(backend, case)}, {count} threads", name, tensor, results[0][name], axes)


def check_ragged_batch(backend: AttentionBackend, cases: Sequence[Case], device: str = "cpu") -> None:
    """Sequences of different lengths over one pool of pages, a call each: none sees or changes another's pages.

    Each sequence's result is, bit for bit, that over a pool in which all other sequences are poison.
    """
    problems = [problem(case) for case in cases]
    size = cases[0].page_tokens
    assert size is not None
    assert {(case.kv_heads, case.head_dim, case.dtype, case.page_tokens, case.batch) for case in cases} == {
        (cases[0].kv_heads, cases[0].head_dim, cases[0].dtype, size, 1)
    }, "sequences of one pool have keys of one shape"
    tables = _shared_tables([case.tokens for case in cases], size)
    pages = 2 + max(int(table.max()) for table in tables)

    def layout(index: int) -> Layout:
        return Layout(cases[index].tokens, tables[index], size, pages)

    def pool(sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        shapes = [(problems[0].kv.head_dim,), (problems[0].kv.value_dim,)]
        keys, values = (layout(0).buffer(cases[0].kv_heads, shape, cases[0].dtype, math.nan) for shape in shapes)
        for sequence in sequences:
            layout(sequence).put(keys, problems[sequence].kv.keys)
            layout(sequence).put(values, problems[sequence].kv.values)
        return keys.to(device), values.to(device)

    def blank_codes() -> tuple[Tensor, Tensor]:
        whole = layout(0)
        codes = whole.buffer(cases[0].kv_heads, (cases[0].head_dim,), torch.int8, CODE_POISON)
        return codes.to(device), whole.buffer(cases[0].kv_heads, (), torch.float32, math.nan, KEY_BLOCK).to(device)

    def run(index: int, kv_pool: tuple[Tensor, Tensor], code_pool: tuple[Tensor, Tensor]) -> _Phases:
        table = tables[index].to(device)
        kv = KvView(*kv_pool, table, cases[index].tokens)
        codes = KeyCodes(*code_pool, problems[index].centre.to(device), table)
        return _run_phases(backend, problems[index], device, kv, codes)

    shared_kv, shared_codes = pool(range(len(cases))), blank_codes()
    together = [run(index, shared_kv, shared_codes) for index in range(len(cases))]
    for index, inputs in enumerate(problems):
        place = f"{where(backend, inputs.case)}, sequence {index} of {len(cases)} in one pool"
        alone = run(index, pool([index]), blank_codes()).tensors()
        for name, tensor in together[index].tensors().items():
            if name.startswith("key "):
                continue  # the whole pool, compared below
            axes = tuple(f"dimension {number}" for number in range(tensor.ndim))
            require_equal(place, name, tensor, alone[name].cpu(), axes)
        gathered = KeyCodes(*shared_codes, inputs.centre.to(device), tables[index].to(device)).gathered(
            inputs.case.tokens
        )
        require_equal(place, "key codes", gathered.codes, inputs.key_codes.codes, QUERY_AXES)
        require_equal(place, "key scales", gathered.scales, inputs.key_codes.scales, QUERY_AXES[:3])


def _shared_tables(lengths: Sequence[int], page_tokens: int) -> list[Tensor]:
    """Page tables int64 `[1, pages]` of sequences whose pages lie interleaved in one pool."""
    counts = [-(-length // page_tokens) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    return [pages.unsqueeze(0) for pages in torch.split(order, counts)]
