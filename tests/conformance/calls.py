"""Checks of whole calls of `attend`: exactness, chunks, sessions, non-finite input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sale_attention import (
    AttentionBackend,
    AttentionRequest,
    AttentionResult,
    BlockGrid,
    HeadPlan,
    KeyCodes,
    KvView,
    LayerPolicy,
    LayerState,
    QueryCodes,
    SaleConfig,
    Selection,
    attend,
)
from sale_attention.backends import _REGISTRY
from tests.conformance.cases import Case
from tests.conformance.compare import QUERY_AXES, require_accuracy, require_equal, require_lse, where
from tests.conformance.inputs import Problem, problem
from tests.conformance.layout import placed_kv, placed_query
from tests.unit.attention.naive import attended, causal_mask, exact_attention


class Recorder(AttentionBackend):
    """A backend that remembers what another one selects, by absolute query block."""

    name = "recorder of the conformance kit"

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self.kept: dict[int, Tensor] = {}

    def supports(self, request: AttentionRequest) -> str | None:
        """As the backend."""
        return self.backend.supports(request)

    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        """As the backend."""
        return self.backend.quantise_query(query, grid, config)

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        """As the backend."""
        self.backend.quantise_key_range(kv, config, start, out)

    def sink_local_lse(self, query: Tensor, kv: KvView, centre: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """As the backend."""
        return self.backend.sink_local_lse(query, kv, centre, grid, scale)

    def add_sampled(self, *arguments: Any) -> None:
        """As the backend."""
        self.backend.add_sampled(*arguments)

    def key_centre(self, kv: KvView, config: SaleConfig) -> Tensor:
        """As the backend."""
        return self.backend.key_centre(kv, config)

    def prepare_rows(self, *arguments: Any) -> tuple[QueryCodes, Tensor]:
        """As the backend."""
        return self.backend.prepare_rows(*arguments)

    def select(
        self,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        thresholds: Tensor,
        plan: HeadPlan,
        grid: BlockGrid,
        kv: KvView,
    ) -> Selection:
        """As the backend, remembered: bool `[B, H, key blocks before the local ones]` by query block."""
        selection = self.backend.select(query_codes, key_codes, thresholds, plan, grid, kv)
        mask = selection.mask().cpu()
        for index in range(grid.query_blocks):
            self.kept[grid.first_query_block + index] = mask[:, :, index, : grid.selectable(index)[1]]
        return selection

    def compute(
        self,
        query: Tensor,
        kv: KvView,
        selection: Selection,
        plan: HeadPlan,
        grid: BlockGrid,
        scale: float,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """As the backend."""
        self.backend.compute(query, kv, selection, plan, grid, scale, output, lse)

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """As the backend."""
        self.backend.attend_all(query, kv, grid, scale, output, lse)

    def attended(self, inputs: Problem) -> Tensor:
        """bool `[B, H, Nq, Nk]`: what the rows of a call of `attend` attended to, all of it in dense heads and rows."""
        case, grid = inputs.case, inputs.grid
        kept = torch.zeros(case.batch, case.heads, grid.query_blocks, grid.key_blocks, dtype=torch.bool)
        for block, blocks in self.kept.items():
            kept[:, :, block - grid.first_query_block, : blocks.shape[-1]] = blocks
        mask = torch.from_numpy(attended(kept.numpy(), case, case.config))
        everything = causal_mask(case)
        mask[:, list(inputs.plan.dense)] = everything
        short = max(0, case.config.dense_rows - case.offset)
        mask[:, :, :short] = everything[:short]
        return mask


@contextmanager
def registered(backend: AttentionBackend) -> Iterator[str]:
    """`attend` knows `backend` inside the block, by the name that this gives."""
    _REGISTRY[backend.name] = backend
    try:
        yield backend.name
    finally:
        del _REGISTRY[backend.name]


@dataclass(frozen=True, eq=False)
class _Call:
    """One prompt through `attend`, in one piece or several."""

    output: Tensor
    lse: Tensor
    recorder: Recorder

    @classmethod
    def of(
        cls,
        backend: AttentionBackend,
        inputs: Problem,
        device: str,
        ends: Sequence[int] | None = None,
        with_state: bool = True,
    ) -> _Call:
        """Rows up to each of the absolute positions `ends` in a call of their own."""
        case, recorder = inputs.case, Recorder(backend)
        query, kv = placed_query(inputs, device), placed_kv(inputs, device)
        state, parts = LayerState(), list[AttentionResult]()
        start = case.offset
        with registered(recorder) as name, torch.inference_mode():
            for end in ends or [case.tokens]:
                parts.append(
                    attend(
                        query[:, :, start - case.offset : end - case.offset],
                        kv.prefix(end),
                        policy=inputs.policy,
                        config=case.config,
                        state=state if with_state else None,
                        prompt_end=case.prompt_end or case.tokens,
                        backend=name,
                    )
                )
                start = end
        assert all(part.lse is not None for part in parts)
        return cls(
            torch.cat([part.output.cpu() for part in parts], dim=2),
            torch.cat([part.lse.cpu() for part in parts if part.lse is not None], dim=2),
            recorder,
        )

    def require_same(self, place: str, other: _Call, rows: slice = slice(None)) -> None:
        """Output, log-sum-exp and selection bit for bit those of `other`."""
        for block, kept in other.recorder.kept.items():
            mine = self.recorder.kept[block]
            require_equal(f"{place}, query block {block}", "decisions", mine, kept, ("batch", "head", "key block"))
        require_equal(place, "outputs", self.output[:, :, rows], other.output[:, :, rows], QUERY_AXES)
        require_equal(place, "lse", self.lse[:, :, rows], other.lse[:, :, rows], QUERY_AXES[:3])


def check_attend(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """A whole call, short rows and dense heads included, against float64 on what was selected."""
    inputs, place = problem(case), f"{where(backend, case)}, attend"
    call = _Call.of(backend, inputs, device)
    expected = inputs.attention(call.recorder.attended(inputs))
    assert call.output.dtype == case.dtype, f"{place}: the output is {call.output.dtype}"
    require_accuracy(place, call.output, expected, list(range(case.heads)))
    require_lse(place, "the log-sum-exp", call.lse, expected.exact_lse)


def check_chunks(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """A prompt in pieces that end at multiples of 128 gives, bit for bit, what it gives in one piece."""
    check_whole_and_chunks(backend, problem(case), device, (128, 384))
    check_whole_and_chunks(backend, problem(case), device, (256,), with_state=False)


def check_whole_and_chunks(
    backend: AttentionBackend, inputs: Problem, device: str, chunks: Sequence[int], with_state: bool = True
) -> None:
    """As `check_chunks`, of given inputs and sizes."""
    case, whole = inputs.case, _Call.of(backend, inputs, device)
    for chunk in chunks:
        boundaries = range(case.offset // 128 * 128 + chunk, case.tokens, chunk)
        pieces = _Call.of(backend, inputs, device, [*boundaries, case.tokens], with_state)
        place = f"{where(backend, case)}, chunks of {chunk} {'with' if with_state else 'without'} state"
        pieces.require_same(place, whole)


def check_appends(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """Calls that end anywhere give what they would without the codes that a session keeps."""
    inputs = problem(case)
    ends = [case.offset + rows for rows in (1, 2, 33, 150, case.rows) if rows <= case.rows]
    continued, afresh = (_Call.of(backend, inputs, device, ends, with_state) for with_state in (True, False))
    continued.require_same(f"{where(backend, case)}, calls ending at {ends}", afresh)


def check_non_finite_keys(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """A NaN or inf in a key or value shows where exact softmax shows it, and in no earlier query block.

    A key that cannot be judged is kept, so every row from its position on shows it; a value shows in the rows that
    attend to it. In its own query block, rows before it may show it, as in torch's fused kernels.
    """
    clean = _mostly_unselected(problem(case))
    unspoiled = _Call.of(backend, clean, device)
    # Past the keys of the centre, and neither sink nor local for most rows.
    position = max(case.config.centre_tokens, case.offset) + 37
    first_row = position - case.offset
    block_start = max(0, position // case.config.query_block * case.config.query_block - case.offset)
    for name in ("keys", "values"):
        for value in (math.nan, math.inf, -math.inf):
            place = f"{where(backend, case)}, {value} among the {name} at {position}"
            spoiled = _mostly_unselected(problem(case))
            getattr(spoiled.kv, name)[:, :, position, 3] = value
            call = _Call.of(backend, spoiled, device)
            if name == "keys":
                exact, exact_lse = exact_attention(spoiled.query, spoiled.kv, causal_mask(case), spoiled.scale)
                finite, finite_lse = exact.isfinite(), exact_lse.isfinite()
            else:
                sees = call.recorder.attended(spoiled)[..., position]
                finite, finite_lse = torch.ones_like(call.output, dtype=torch.bool), torch.ones_like(sees)
                finite[..., 3] = ~sees
            rows = slice(first_row, None)
            axes = ("batch", "head", "row from it on", "channel")
            require_equal(place, "finite outputs", call.output.isfinite()[:, :, rows], finite[:, :, rows], axes)
            require_equal(place, "finite lse", call.lse.isfinite()[:, :, rows], finite_lse[:, :, rows], axes[:3])
            before = slice(0, block_start)
            require_equal(
                place, "earlier outputs", call.output[:, :, before], unspoiled.output[:, :, before], QUERY_AXES
            )
            require_equal(place, "earlier lse", call.lse[:, :, before], unspoiled.lse[:, :, before], QUERY_AXES[:3])


def check_non_finite_queries(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """A NaN or inf in a query row shows in that row, and changes nothing outside its query block."""
    clean = _mostly_unselected(problem(case))
    unspoiled = _Call.of(backend, clean, device)
    row = case.rows // 2
    block = (case.offset + row) // case.config.query_block
    start = max(0, block * case.config.query_block - case.offset)
    others = [r for r in range(case.rows) if not start <= r < start + case.config.query_block]
    for value in (math.nan, math.inf, -math.inf):
        place = f"{where(backend, case)}, {value} in query row {row}"
        spoiled = _mostly_unselected(problem(case))
        spoiled.query[:, :, row, 3] = value
        call = _Call.of(backend, spoiled, device)
        finite = call.output.isfinite().all(-1)
        assert not bool(call.output[:, :, row].isfinite().any()), f"{place}: the row's output is finite"
        assert not bool(call.lse[:, :, row].isfinite().any()), f"{place}: the row's log-sum-exp is finite"
        assert int((~finite).sum()) == case.batch * case.heads, f"{place}: it shows in other rows"
        require_equal(place, "other outputs", call.output[:, :, others], unspoiled.output[:, :, others], QUERY_AXES)
        require_equal(place, "other lse", call.lse[:, :, others], unspoiled.lse[:, :, others], QUERY_AXES[:3])


def _mostly_unselected(inputs: Problem) -> Problem:
    """A fresh copy whose thresholds are so high that only what cannot be judged is selected."""
    fresh = Problem(inputs.case)
    fresh.policy = LayerPolicy.uniform(inputs.case.heads, tau=1e4)
    fresh.plan = HeadPlan.resolve(fresh.policy, inputs.case.config, inputs.case.tokens)
    return fresh
