"""Checks of single phases, each run on the reference's inputs to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sale_attention import (
    AttentionBackend,
    AttentionRequest,
    KeyCodes,
    KeyExtension,
    LayerCall,
    QueryCodes,
    Selection,
)
from sale_attention.quantise import default_key_centre, quantise_query
from sale_attention.select import select_blocks, voting_rows
from tests.conformance.cases import Case
from tests.conformance.compare import (
    QUERY_AXES,
    require_accuracy,
    require_equal,
    require_lse,
    require_selection,
    where,
)
from tests.conformance.inputs import Problem, problem
from tests.conformance.layout import (
    KEY_BLOCK,
    GuardedResults,
    bits_of,
    empty_key_codes,
    is_written,
    moved_key_codes,
    placed_kv,
    placed_query,
    written_key_codes,
)

_PAGE_AXES = ("page or batch", "kv head", "token of it", "channel")


def unsupported(backend: AttentionBackend, case: Case, device: str = "cpu") -> str | None:
    """Why `backend` declines `case`, which it may do with an optional one only."""
    inputs = problem(case)
    request = AttentionRequest(placed_query(inputs, device), placed_kv(inputs, device), inputs.policy, case.config)
    reason = backend.supports(request)
    if reason is not None and not case.optional:
        raise AssertionError(f"{where(backend, case)}: declined ({reason}), but every backend does such cases")
    return reason


def check_key_centre(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """The mean of the first keys, summed in float64: within a unit in the last place."""
    inputs = problem(case)
    expected = default_key_centre(inputs.kv, case.config)
    result = backend.key_centre(placed_kv(inputs, device), case.config).cpu()
    near = (expected.nextafter(torch.tensor(-math.inf)) <= result) & (
        result <= expected.nextafter(torch.tensor(math.inf))
    )
    wrong = int((~near).sum())
    assert not wrong, f"{where(backend, case)}: {wrong} of {near.numel()} elements of the key centre are off"


def check_query_codes(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Query codes and scales bit for bit; with 4-bit codes, given the backend's own block means."""
    inputs, place = problem(case), where(backend, case)
    result = backend.quantise_query(placed_query(inputs, device), inputs.grid, case.config)
    expected = inputs.query_codes
    if case.config.code_bits == 4:
        assert result.block_means is not None, f"{place}: 4-bit query codes come without their block means"
        own = quantise_query(inputs.query, inputs.grid, case.config)
        assert own.block_means is not None
        # Sums in another order may round to a neighbour.
        torch.testing.assert_close(result.block_means.cpu(), own.block_means, rtol=2.4e-7, atol=1e-12)
        expected = quantise_query(inputs.query, inputs.grid, case.config, result.block_means.cpu())
    # Scales first: a wrong one makes wrong codes.
    require_equal(place, "query scales", result.scales, expected.scales, QUERY_AXES[:3])
    require_equal(place, "query codes", result.codes, expected.codes, QUERY_AXES)


def check_key_codes(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Key codes and scales bit for bit: at once, from a later start, and continued; nothing else is written."""
    inputs, place = problem(case), where(backend, case)
    kv = placed_kv(inputs, device)

    def require(out: KeyCodes, start: int, how: str) -> None:
        expected = written_key_codes(inputs, inputs.key_codes, start)
        require_equal(place, f"key scales {how}", out.scales, expected.scales, ("page or batch", "kv head", "block"))
        require_equal(place, f"key codes {how}", out.codes, expected.codes, _PAGE_AXES)

    whole = moved_key_codes(empty_key_codes(inputs), device)
    backend.quantise_key_range(kv, case.config, 0, whole)
    require(whole, 0, "(all at once)")
    middle = case.tokens * 2 // 3
    start = middle // KEY_BLOCK * KEY_BLOCK
    later = moved_key_codes(empty_key_codes(inputs), device)
    backend.quantise_key_range(kv, case.config, start, later)
    require(later, start, f"(from {start} on)")
    if middle:
        continued = moved_key_codes(empty_key_codes(inputs), device)
        backend.quantise_key_range(kv.prefix(middle), case.config, 0, continued)
        backend.quantise_key_range(kv, case.config, start, continued)
        require(continued, 0, f"(first {middle} tokens, then from {start} on)")


def check_sink_local_lse(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Log-sum-exp of centred sink and local scores, against float64."""
    inputs = problem(case)
    lse = backend.sink_local_lse(
        placed_query(inputs, device),
        placed_kv(inputs, device),
        inputs.centre.to(device),
        inputs.grid,
        inputs.scale,
    )
    require_lse(where(backend, case), "the sink-local log-sum-exp", lse, inputs.sink_local_lse)


def check_sampled_lse(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """What a sample adds to the sink-local log-sum-exp of rows that vote, against float64."""
    inputs, stride = problem(case), case.config.sample_stride
    lse = inputs.sink_local_lse.float().to(device)
    codes = inputs.query_codes
    backend.add_sampled(
        lse,
        QueryCodes(codes.codes.to(device), codes.scales.to(device)),
        moved_key_codes(written_key_codes(inputs, inputs.key_codes), device),
        inputs.plan,
        inputs.grid,
        stride,
        inputs.scale,
    )
    voters = torch.zeros(lse.shape[1:], dtype=torch.bool)
    for head, head_stride in enumerate(inputs.plan.strides):
        for index in range(inputs.grid.query_blocks if head_stride else 0):
            voters[head, list(voting_rows(inputs.grid, inputs.plan, head_stride, index))] = True
    expected = inputs.sampled_lse
    require_lse(
        where(backend, case), "the sampled log-sum-exp", torch.where(voters, lse.cpu(), expected.float()), expected
    )


def check_selection(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """From the same codes, scales and thresholds, the same mask bit for bit."""
    inputs = problem(case)
    key_codes = written_key_codes(inputs, inputs.key_codes)
    result = _select(backend, inputs, inputs.query_codes, key_codes, inputs.thresholds, device)
    require_selection(inputs, where(backend, case), result.words, inputs.selection.words)


def check_selection_of_extreme_codes(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """As `check_selection`, where every decision hangs on one bit of one product.

    Codes are nearly all 127 or -127, so sums reach what 16 bits cannot hold. One inspected row a query block has a
    threshold equal to one block's estimate, or the number below it; the other inspected rows keep nothing, and rows
    that a stride leaves out would keep everything.
    """
    assert case.config.code_bits == 8, "codes of 4 bits cannot be extreme"
    inputs = problem(case)
    generator = torch.Generator().manual_seed(case.seed)
    signs = [torch.randint(0, 2, codes.shape, generator=generator) * 2 - 1 for codes in _both_codes(inputs)]
    # Some rows and keys agree in nearly every sign.
    for sign in signs:
        lean = torch.rand(sign.shape[:3], generator=generator).unsqueeze(3) < 0.3
        sign[(lean & (torch.rand(sign.shape, generator=generator) < 0.9)).expand_as(sign)] = 1
    sizes = [127 - (torch.rand(sign.shape, generator=generator) < 0.2).long() for sign in signs]
    query_signs, key_signs = ((sign * size).to(torch.int8) for sign, size in zip(signs, sizes, strict=True))
    scales = torch.rand(inputs.key_codes.scales.shape, generator=generator) + 0.01
    keys = KeyCodes(key_signs, scales, inputs.centre)
    query = QueryCodes(query_signs, torch.ones(inputs.query_codes.scales.shape))
    thresholds = _tied_thresholds(inputs, query, keys, generator)
    expected = select_blocks(query, keys, thresholds, inputs.plan, inputs.grid, inputs.kv)
    result = _select(backend, inputs, query, written_key_codes(inputs, keys), thresholds, device)
    require_selection(inputs, f"{where(backend, case)}, extreme codes", result.words, expected.words)


def _both_codes(inputs: Problem) -> tuple[Tensor, Tensor]:
    return inputs.query_codes.codes, inputs.key_codes.codes


def _tied_thresholds(inputs: Problem, query: QueryCodes, keys: KeyCodes, generator: torch.Generator) -> Tensor:
    case, grid, plan = inputs.case, inputs.grid, inputs.plan
    thresholds = torch.full((case.batch, case.heads, case.rows), -math.inf)
    for head in range(case.heads):
        stride, kv_head = plan.strides[head], head * case.kv_heads // case.heads
        for index in range(grid.query_blocks if stride else 0):
            votes = list(voting_rows(grid, plan, stride, index))
            thresholds[:, head, votes] = math.inf
            start, end = grid.selectable(index)
            if start == end:
                continue
            row = votes[int(torch.randint(len(votes), (), generator=generator))]
            block = start + int(torch.randint(end - start, (), generator=generator))
            tokens = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
            products = keys.codes[:, kv_head, tokens].long() @ query.codes[:, head, row].long().unsqueeze(2)
            estimate = products.amax(dim=(1, 2)).float() * keys.scales[:, kv_head, block]
            if (index + head) % 2:
                estimate = torch.nextafter(estimate, torch.tensor(-math.inf))
            thresholds[:, head, row] = estimate
    return thresholds


def check_selection_of_what_cannot_be_judged(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Thresholds NaN and -inf keep every block, inf none; a block whose scale is NaN or inf is kept in any case."""
    inputs, place = problem(case), where(backend, case)
    selectable = inputs.selectable_blocks().expand(case.batch, -1, -1, -1)
    key_codes = inputs.key_codes
    for value, everything in ((math.nan, True), (-math.inf, True), (math.inf, False)):
        thresholds = torch.full_like(inputs.thresholds, value)
        result = _select(backend, inputs, inputs.query_codes, written_key_codes(inputs, key_codes), thresholds, device)
        expected = selectable if everything else torch.zeros_like(selectable)
        _require_mask(f"{place}, all thresholds {value}", result, expected)
    for scale in (math.nan, math.inf):
        odd = torch.arange(inputs.grid.key_blocks) % 3 == 1
        # The quantiser gives such blocks codes of zero.
        codes = key_codes.codes.masked_fill(odd.repeat_interleave(KEY_BLOCK)[: case.tokens].unsqueeze(1), 0)
        spoiled = KeyCodes(codes, key_codes.scales.masked_fill(odd, scale), inputs.centre)
        thresholds = torch.full_like(inputs.thresholds, torch.finfo(torch.float32).max)
        result = _select(backend, inputs, inputs.query_codes, written_key_codes(inputs, spoiled), thresholds, device)
        _require_mask(f"{place}, every third scale {scale}", result, selectable & odd)


def _require_mask(place: str, result: Selection, expected: Tensor) -> None:
    require_equal(place, "block decisions", result.mask(), expected, ("batch", "head", "query block", "key block"))


def _select(
    backend: AttentionBackend,
    inputs: Problem,
    query_codes: QueryCodes,
    key_codes: KeyCodes,
    thresholds: Tensor,
    device: str,
) -> Selection:
    means = query_codes.block_means
    return backend.select(
        QueryCodes(
            query_codes.codes.to(device), query_codes.scales.to(device), None if means is None else means.to(device)
        ),
        moved_key_codes(key_codes, device),
        thresholds.to(device),
        inputs.plan,
        inputs.grid,
        placed_kv(inputs, device),
    )


def check_compute(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Output and log-sum-exp over the reference's selection; dense heads and all other memory untouched."""
    inputs, place = problem(case), where(backend, case)
    results = GuardedResults(inputs, device)
    selection = Selection(inputs.selection.words.to(device), inputs.selection.key_blocks)
    backend.compute(
        placed_query(inputs, device),
        placed_kv(inputs, device),
        selection,
        inputs.plan,
        inputs.grid,
        inputs.scale,
        results.output,
        results.lse,
    )
    dense = [head for head, is_dense in enumerate(inputs.plan.dense) if is_dense]
    sparse = [head for head, is_dense in enumerate(inputs.plan.dense) if not is_dense]
    for name, result in (("output", results.output), ("lse", results.lse)):
        touched = int(is_written(result[:, dense]).sum())
        assert not touched, f"{place}: {touched} elements of {name} were written in dense heads {dense}"
    outside = results.written_outside()
    assert not outside, f"{place}: {outside} elements were written outside output and lse"
    if sparse:
        expected = inputs.selected
        require_accuracy(place, results.output, expected, sparse)
        require_lse(place, "the log-sum-exp", results.lse[:, sparse], expected.exact_lse[:, sparse])


def check_layer(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """A sparse call as a whole, with and without short rows and older codes: bit for bit what the phases give."""
    inputs = problem(case)
    block, tokens = case.config.query_block, case.tokens
    middle = (case.offset // block + 1 + (inputs.grid.query_blocks - 1) // 3) * block
    if all(inputs.plan.dense):
        return
    for dense_until, start in ((0, 0), (middle, tokens // 2 // KEY_BLOCK * KEY_BLOCK)):
        if dense_until >= tokens:
            continue
        place = f"{where(backend, case)}, the whole layer, short rows until {dense_until}, codes until {start}"
        by_phases = _Layer(inputs, device, dense_until, start)
        by_phases.run(partial(AttentionBackend.attend_layer, backend))
        for reported in (True, False):
            whole = _Layer(inputs, device, dense_until, start, reported)
            whole.run(backend.attend_layer)
            whole.require_same(place, by_phases)


class _Layer:
    """Room for the results of one `attend_layer`; `reported`: log-sum-exp and kept blocks are wanted."""

    def __init__(self, inputs: Problem, device: str, dense_until: int, start: int, reported: bool = True) -> None:
        case = inputs.case
        self.results = GuardedResults(inputs, device)
        self.kept = torch.full((case.heads,), 7, dtype=torch.int64, device=device) if reported else None
        # Codes before the start are there, and with them the centre.
        older = KeyCodes(
            inputs.key_codes.codes[:, :, :start], inputs.key_codes.scales[:, :, : start // KEY_BLOCK], inputs.centre
        )
        codes = moved_key_codes(written_key_codes(inputs, older), device)
        centre = codes.centre.clone() if start else torch.full_like(codes.centre, math.nan)
        self.codes = KeyCodes(codes.codes, codes.scales, centre, codes.page_table)
        centre_tokens = 0 if start else min(case.config.centre_tokens, case.tokens)
        self.call = LayerCall(
            query=placed_query(inputs, device),
            kv=placed_kv(inputs, device),
            keys=KeyExtension(self.codes, start, centre_tokens),
            policy=inputs.policy,
            plan=inputs.plan,
            config=case.config,
            scale=inputs.scale,
            dense_until=dense_until,
            output=self.results.output,
            lse=self.results.lse if reported else None,
            kept=self.kept,
            statistics=None,
        )

    def run(self, attend_layer: Callable[[LayerCall], None]) -> None:
        attend_layer(self.call)

    def require_same(self, place: str, expected: _Layer) -> None:
        """Everything that was written, bit for bit."""
        outside = self.results.written_outside()
        assert not outside, f"{place}: {outside} elements were written outside output and lse"
        pairs = [
            ("the key centre", self.codes.centre, expected.codes.centre),
            ("key codes", self.codes.codes, expected.codes.codes),
            ("key scales", bits_of(self.codes.scales), bits_of(expected.codes.scales)),
            ("outputs", bits_of(self.results.output), bits_of(expected.results.output)),
        ]
        if self.kept is not None and expected.kept is not None:
            pairs += [
                ("log-sum-exps", bits_of(self.results.lse), bits_of(expected.results.lse)),
                ("counts of kept blocks", self.kept, expected.kept),
            ]
        for what, mine, theirs in pairs:
            axes = tuple(f"axis {axis}" for axis in range(mine.ndim))
            require_equal(place, what, mine, theirs.cpu(), axes)


def check_attend_all(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Output and log-sum-exp over all keys; without log-sum-exp, the same output bit for bit."""
    inputs, place = problem(case), f"{where(backend, case)}, attend_all"
    query, kv = placed_query(inputs, device), placed_kv(inputs, device)
    results, without_lse = GuardedResults(inputs, device), GuardedResults(inputs, device)
    backend.attend_all(query, kv, inputs.grid, inputs.scale, results.output, results.lse)
    backend.attend_all(query, kv, inputs.grid, inputs.scale, without_lse.output, None)
    for outside in (results.written_outside(), without_lse.written_outside()):
        assert not outside, f"{place}: {outside} elements were written outside output and lse"
    require_accuracy(place, results.output, inputs.everything, list(range(case.heads)))
    require_lse(place, "the log-sum-exp", results.lse, inputs.everything.exact_lse)
    require_equal(place, "outputs without lse", without_lse.output, results.output.cpu(), QUERY_AXES)


def check_phases(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Every phase by itself, each from the reference's inputs to it."""
    check_query_codes(backend, case, device)
    check_key_codes(backend, case, device)
    check_sink_local_lse(backend, case, device)
    if case.config.sample_stride:
        check_sampled_lse(backend, case, device)
    check_selection(backend, case, device)
    if case.config.code_bits == 8:
        check_selection_of_extreme_codes(backend, case, device)
        check_selection_of_what_cannot_be_judged(backend, case, device)
    check_compute(backend, case, device)
    check_attend_all(backend, case, device)
