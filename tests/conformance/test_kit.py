"""The kit itself: it catches planted faults, its expectations are the oracle's, its inputs are what they claim."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sale_attention import (
    AttentionBackend,
    AttentionRequest,
    BlockGrid,
    HeadPlan,
    KeyCodes,
    KvView,
    LayerCall,
    QueryCodes,
    SaleConfig,
    Selection,
    compute,
    quantise,
    sampled,
    select,
)
from sale_attention.reference import ReferenceBackend
from sale_attention.sampled import sampled_positions
from tests.conformance import cases, kit
from tests.conformance.cases import Case
from tests.conformance.inputs import problem
from tests.conformance.layout import CODE_POISON, empty_key_codes, placed_kv, written_key_codes
from tests.unit.attention.naive import naive_selection

PLAIN = Case(129, 255, 2, 1, seed=9)
PAGED = cases.LAYOUTS[0]
FLOAT32 = replace(PLAIN, dtype=torch.float32)
TIES = next(case for case in cases.VALUES if case.inputs == "ties")
FLOAT32_TIES = next(case for case in cases.VALUES if case.inputs == "ties" and case.dtype == torch.float32)
FAINT = next(case for case in cases.VALUES if case.inputs == "faint")
MIXED_HEADS, STRIDED = cases.POLICIES[:2]
FOUR_BIT = cases.OPTIONAL[0]


class FlippedBit(ReferenceBackend):
    """One decision is the other way round."""

    def select(self, *arguments: Any) -> Selection:
        selection = super().select(*arguments)
        selection.words[0, 1, 2] ^= 1 << 3
        return selection


class BitPastTheLastBlock(ReferenceBackend):
    """A bit is set that stands for no key block."""

    def select(self, *arguments: Any) -> Selection:
        selection = super().select(*arguments)
        selection.words[..., -1] |= 1 << 30
        return selection


class KeepsTies(ReferenceBackend):
    """`>=` where the method says `>`."""

    def select(self, query_codes: QueryCodes, key_codes: KeyCodes, thresholds: Tensor, *rest: Any) -> Selection:
        lower = torch.nextafter(thresholds, torch.tensor(-torch.inf))
        return super().select(query_codes, key_codes, lower, *rest)


class DropsWhatItCannotJudge(ReferenceBackend):
    """An ordered compare: NaN is not above the threshold, so the block is skipped."""

    def select(self, query_codes: QueryCodes, key_codes: KeyCodes, thresholds: Tensor, *rest: Any) -> Selection:
        scales = key_codes.scales.nan_to_num(nan=0.0, posinf=0.0)
        codes = KeyCodes(key_codes.codes, scales, key_codes.centre, key_codes.page_table)
        return super().select(query_codes, codes, thresholds.nan_to_num(nan=torch.inf, neginf=-torch.inf), *rest)


def saturating_products(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Unsigned by signed bytes, neighbouring products added in 16 bits: x86's vpmaddubsw."""
    unsigned, signed = query_codes.long() + 128, key_codes.long()
    pairs = [unsigned[:, None, lane::2] * signed[None, :, lane::2] for lane in range(2)]
    sums = (pairs[0] + pairs[1]).clamp(-(1 << 15), (1 << 15) - 1).sum(-1)
    return (sums - 128 * signed.sum(-1)).to(torch.int32)


class SaturatesProducts(ReferenceBackend):
    """Sums of two products are cut to 16 bits."""

    def select(self, *arguments: Any) -> Selection:
        with mock.patch.object(select, "code_products", saturating_products):
            return super().select(*arguments)


class IgnoresStrides(ReferenceBackend):
    """Every row is inspected."""

    def select(self, *arguments: Any) -> Selection:
        query_codes, key_codes, thresholds, plan, *rest = arguments
        every_row = plan._replace(strides=tuple(min(1, stride) for stride in plan.strides))
        return super().select(query_codes, key_codes, thresholds, every_row, *rest)


class ForgetsTheTail(ReferenceBackend):
    """The stride holds to the end of the prompt."""

    def select(self, *arguments: Any) -> Selection:
        query_codes, key_codes, thresholds, plan, *rest = arguments
        return super().select(query_codes, key_codes, thresholds, plan._replace(unstrided_from=1 << 30), *rest)


class ForgetsTheCorrection(ReferenceBackend):
    """Of 4-bit queries, what centring took away is not given back."""

    def select(self, query_codes: QueryCodes, *arguments: Any) -> Selection:
        assert query_codes.block_means is not None
        means = torch.zeros_like(query_codes.block_means)
        return super().select(replace(query_codes, block_means=means), *arguments)


class SelectsFromTheWrongPage(ReferenceBackend):
    """Two pages of codes are confused."""

    def select(self, query_codes: QueryCodes, key_codes: KeyCodes, *arguments: Any) -> Selection:
        return super().select(query_codes, with_pages_confused(key_codes), *arguments)


class QueryCodeOffByOne(ReferenceBackend):
    """One code of all."""

    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        result = super().quantise_query(query, grid, config)
        result.codes[-1, -1, -1, 5] += 1
        return result


class KeyCodeOffByOne(ReferenceBackend):
    """One code of all."""

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        super().quantise_key_range(kv, config, start, out)
        out.codes[0, 0, 40, 5] += 1


class WithOtherGroups(ReferenceBackend):
    """Quantises with a rule of its own for scales and codes."""

    def groups(self, values: Tensor, amax: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Takes the place of `quantise.quantise_groups`."""
        raise NotImplementedError

    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        with mock.patch.object(quantise, "quantise_groups", self.groups):
            return super().quantise_query(query, grid, config)

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        with mock.patch.object(quantise, "quantise_groups", self.groups):
            super().quantise_key_range(kv, config, start, out)


class RoundsHalfUp(WithOtherGroups):
    """Ties go up, not to the even neighbour."""

    def groups(self, values: Tensor, amax: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        scales = (amax / limit).clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.floor(values / scales.unsqueeze(-1) + 0.5).clamp(-limit, limit)
        return codes.to(torch.int8), scales


class ReciprocalScale(WithOtherGroups):
    """The scale is a product with 1 / 127."""

    def groups(self, values: Tensor, amax: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        scales = (amax * (torch.ones(()) / limit)).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (values / scales.unsqueeze(-1)).round().clamp(-limit, limit)
        return codes.to(torch.int8), scales


class ReciprocalQuotient(WithOtherGroups):
    """Codes are products with 1 / scale."""

    def groups(self, values: Tensor, amax: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        scales = (amax / limit).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (values * (1 / scales).unsqueeze(-1)).round().clamp(-limit, limit)
        return codes.to(torch.int8), scales


class QuantisesIntoTheWrongPage(ReferenceBackend):
    """Two pages of codes are confused."""

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        super().quantise_key_range(kv, config, start, with_pages_confused(out))


class QuantisesWholeBlocks(ReferenceBackend):
    """The last block is read and written to its end, past the last key."""

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        super().quantise_key_range(kv.prefix(-(-kv.tokens // 32) * 32), config, start, out)


class QuantisesTheStartAgain(ReferenceBackend):
    """Codes before the start are written as well."""

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        super().quantise_key_range(kv, config, 0, out)


class ContinuesWrongly(ReferenceBackend):
    """Codes after a start have scales of their own."""

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        super().quantise_key_range(kv, config, start, out)
        if start:
            out.scales[:, :, start // 32 :] *= 1.5


class CentreOff(ReferenceBackend):
    def key_centre(self, kv: KvView, config: SaleConfig) -> Tensor:
        return super().key_centre(kv, config) + 1e-5


class LeavesKeysOut(ReferenceBackend):
    """The whole layer takes new keys for known ones."""

    def attend_layer(self, call: LayerCall) -> None:
        whole_blocks = call.kv.tokens // call.config.key_block * call.config.key_block
        super().attend_layer(call._replace(keys=call.keys._replace(start=whole_blocks)))


class ForgetsShortRows(ReferenceBackend):
    """The whole layer computes short rows like the others."""

    def attend_layer(self, call: LayerCall) -> None:
        super().attend_layer(call._replace(dense_until=0))


class CountsOneTooMany(ReferenceBackend):
    """The whole layer reports a block that it did not keep."""

    def attend_layer(self, call: LayerCall) -> None:
        super().attend_layer(call)
        if call.kept is not None:
            call.kept.add_(1)


class SinkLocalLseOff(ReferenceBackend):
    """By a hundredth of a nat."""

    def sink_local_lse(self, *arguments: Any) -> Tensor:
        return super().sink_local_lse(*arguments) + 1e-2


class ForgetsTheLastSample(ReferenceBackend):
    """The sample ends a key early."""

    def add_sampled(self, lse: Tensor, *arguments: Any) -> None:
        with mock.patch.object(sampled, "sampled_positions", lambda *of: sampled_positions(*of)[:-1]):
            super().add_sampled(lse, *arguments)


class AltersResults(ReferenceBackend):
    """Does something to output and log-sum-exp after the computation."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        """The fault."""
        raise NotImplementedError

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
        super().compute(query, kv, selection, plan, grid, scale, output, lse)
        self.alter(query, kv, output, lse)

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        super().attend_all(query, kv, grid, scale, output, lse)
        self.alter(query, kv, output, query.new_empty(()) if lse is None else lse)


class LseOff(AltersResults):
    """By a hundredth of a nat."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        lse += 1e-2


class LosesFaintWeights(ReferenceBackend):
    """Weights are added one by one to a running float32 sum, beside which the smallest are nothing."""

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        super().attend_all(query, kv, grid, scale, output, lse)
        if lse is not None:
            scores = (query.float() @ kv.keys_between(0, kv.tokens).float().transpose(2, 3)) * scale
            future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(grid.offset + 1)
            largest = scores.masked_fill(future, -torch.inf).amax(-1, keepdim=True)
            weights = (scores - largest).exp().masked_fill(future, 0.0)
            total = np.cumsum(weights.numpy(), axis=-1, dtype=np.float32)[..., -1]
            lse.copy_(largest.squeeze(-1) + torch.from_numpy(total).log())


class LeavesARowUnwritten(AltersResults):
    """The last row of the last head holds what it held before."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output[-1, -1, -1] = torch.nan


class LosesPrecision(AltersResults):
    """float32 results pass through bfloat16."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output.copy_(output.bfloat16())


class SpoilsOneRow(AltersResults):
    """One row of many is off by a few roundings, which the whole head would hide."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output[:, :, 7] *= 1.02


class ClearsDenseHeads(AltersResults):
    """Rows of dense heads are set to zero before somebody else fills them."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output[:, 0] = 0


class WritesBehindARow(AltersResults):
    """A whole vector more is stored than the row has."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output.as_strided((8,), (1,), output.storage_offset() + output.shape[3]).zero_()


class ReadsUnusedMemory(AltersResults):
    """Keys that are not there are multiplied by zero weights."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output += 0 * kv.values.sum()


class SeesNeighbours(AltersResults):
    """The whole pool has a little influence on every row."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output += 0.1 * kv.values.nan_to_num().mean()


class DependsOnTheCall(AltersResults):
    """Results carry a trace of how many rows came together."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output *= 1 + query.shape[2] * 1e-4


class DependsOnThreads(AltersResults):
    """Results carry a trace of how many threads worked."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output += 0.01 * torch.get_num_threads()


class HidesNonFinite(AltersResults):
    """NaN becomes zero."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output.nan_to_num_(posinf=0.0, neginf=0.0)


class SpreadsNonFinite(AltersResults):
    """A row that is not finite takes all rows of its head with it."""

    def alter(self, query: Tensor, kv: KvView, output: Tensor, lse: Tensor) -> None:
        output += 0 * output.sum(dim=2, keepdim=True)


class ComputesFromTheWrongPage(ReferenceBackend):
    """Two pages of keys and values are confused."""

    def compute(self, query: Tensor, kv: KvView, *arguments: Any) -> None:
        assert kv.page_table is not None
        super().compute(query, replace(kv, page_table=confused(kv.page_table)), *arguments)


def mask_shifted_by_one(blocks: Any, scores: Tensor, index: int) -> None:
    """`compute._HeadBlocks._mask_future`, but every row sees the key after its own as well."""
    start, end = blocks.grid.rows(index)
    rows = torch.arange(blocks.grid.offset + start, blocks.grid.offset + end).unsqueeze(1)
    keys = torch.arange(-scores.shape[1], 0) + blocks.grid.causal_end(index) * 32
    scores.masked_fill_(keys > rows + 1, float("-inf"))


class ShiftsTheMask(ReferenceBackend):
    """Each row sees one key too many in one way of computing, one too few in the other."""

    def compute(self, *arguments: Any) -> None:
        with mock.patch.object(compute._HeadBlocks, "_mask_future", mask_shifted_by_one):
            super().compute(*arguments)

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        super().attend_all(query, kv, grid, scale, output, lse)
        keys, values = kv.keys_between(0, kv.tokens), kv.values_between(0, kv.tokens)
        mask = torch.ones(grid.query_tokens, grid.key_tokens, dtype=torch.bool).tril(grid.offset - 1)
        output.copy_(scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True))


class SelectsByTheCall(ReferenceBackend):
    """Calls behind others decide one block differently."""

    def select(
        self, query_codes: Any, key_codes: Any, thresholds: Any, plan: Any, grid: BlockGrid, kv: Any
    ) -> Selection:
        selection = super().select(query_codes, key_codes, thresholds, plan, grid, kv)
        if grid.offset >= 512:
            selection.words[0, 1, 0] ^= 1 << 3
        return selection


class CentresByTheKeys(ReferenceBackend):
    """Keys are centred by their own mean, whatever centre is given."""

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        super().quantise_key_range(kv, config, start, replace(out, centre=self.key_centre(kv, config)))


class DeclinesEverything(ReferenceBackend):
    """Nothing is supported, so nothing can be wrong."""

    def supports(self, request: AttentionRequest) -> str | None:
        return "not today"


def confused(table: Tensor) -> Tensor:
    """The first two pages of every sequence, exchanged."""
    return torch.cat([table[:, 1:2], table[:, :1], table[:, 2:]], dim=1)


def with_pages_confused(codes: KeyCodes) -> KeyCodes:
    assert codes.page_table is not None
    return replace(codes, page_table=confused(codes.page_table))


Check = Callable[[AttentionBackend], Any]


@dataclass(frozen=True)
class Planted:
    """A fault, the check that must catch it on a case that a good backend passes, and what it must say."""

    fault: type[ReferenceBackend]
    check: Callable[..., Any]
    on: Any
    message: str

    def __str__(self) -> str:
        """The test's id."""
        return f"{self.fault.__name__} by {self.check.__name__}"

    def run(self, backend: AttentionBackend) -> None:
        self.check(backend, self.on)


PLANTED = [
    Planted(FlippedBit, kit.check_selection, PLAIN, r"1 of \d+ block decisions.*head 1, query block 2.*key block 3 "),
    Planted(BitPastTheLastBlock, kit.check_selection, PLAIN, r"block decisions differ.*key block 30"),
    Planted(ForgetsTheCorrection, kit.check_selection, FOUR_BIT, r"block decisions differ"),
    Planted(SelectsFromTheWrongPage, kit.check_selection, PAGED, r"block decisions differ"),
    Planted(SaturatesProducts, kit.check_selection_of_extreme_codes, PLAIN, r"extreme codes.*decisions differ"),
    Planted(KeepsTies, kit.check_selection_of_extreme_codes, PLAIN, r"kept, not by the reference"),
    Planted(IgnoresStrides, kit.check_selection_of_extreme_codes, STRIDED, r"kept, not by the reference"),
    Planted(ForgetsTheTail, kit.check_selection_of_extreme_codes, STRIDED, r"decisions differ"),
    Planted(DropsWhatItCannotJudge, kit.check_selection_of_what_cannot_be_judged, PLAIN, r"all thresholds nan"),
    Planted(QueryCodeOffByOne, kit.check_query_codes, PLAIN, r"1 of \d+ query codes.*head 1, row 128, channel 5"),
    Planted(RoundsHalfUp, kit.check_query_codes, TIES, r"query codes differ"),
    Planted(RoundsHalfUp, kit.check_key_codes, TIES, r"key codes .* differ"),
    Planted(ReciprocalScale, kit.check_query_codes, PLAIN, r"query scales differ"),
    Planted(ReciprocalScale, kit.check_key_codes, cases.EDGES[5], r"key scales .* differ"),
    Planted(ReciprocalQuotient, kit.check_query_codes, FLOAT32_TIES, r"query codes differ"),
    Planted(ReciprocalQuotient, kit.check_key_codes, FLOAT32_TIES, r"key codes .* differ"),
    Planted(KeyCodeOffByOne, kit.check_key_codes, PLAIN, r"1 of \d+ key codes .*token of it 40, channel 5"),
    Planted(QuantisesIntoTheWrongPage, kit.check_key_codes, PAGED, r"key scales \(all at once\)"),
    Planted(QuantisesWholeBlocks, kit.check_key_codes, Case(100, 290), r"key scales .* nan instead of"),
    Planted(QuantisesTheStartAgain, kit.check_key_codes, PLAIN, r"key scales \(from 256 on\) differ.* instead of nan"),
    Planted(ContinuesWrongly, kit.check_key_codes, PLAIN, r"key scales \(from 256 on\)"),
    Planted(CentreOff, kit.check_key_centre, PLAIN, r"64 of 64 elements of the key centre are off"),
    Planted(LeavesKeysOut, kit.check_layer, PLAIN, r"key codes differ"),
    Planted(ForgetsShortRows, kit.check_layer, PLAIN, r"outputs differ"),
    Planted(CountsOneTooMany, kit.check_layer, PLAIN, r"counts of kept blocks differ"),
    Planted(SinkLocalLseOff, kit.check_sink_local_lse, PLAIN, r"sink-local log-sum-exp of 258 of 258 rows"),
    Planted(ForgetsTheLastSample, kit.check_sampled_lse, cases.SAMPLED[0], r"sampled log-sum-exp of \d+ of"),
    Planted(SinkLocalLseOff, kit.check_end_to_end, [cases.END_TO_END[0]], r"nats from the threshold"),
    Planted(LseOff, kit.check_compute, PLAIN, r"log-sum-exp of 258 of 258 rows"),
    Planted(LseOff, kit.check_attend_all, PLAIN, r"log-sum-exp of 258 of 258 rows"),
    Planted(LseOff, kit.check_attend, PLAIN, r"log-sum-exp"),
    Planted(LosesFaintWeights, kit.check_attend_all, FAINT, r"log-sum-exp of 4 of 4 rows"),
    Planted(LeavesARowUnwritten, kit.check_compute, PLAIN, r"1 output rows were left unwritten.*head 1, row 128"),
    Planted(LeavesARowUnwritten, kit.check_attend_all, PLAIN, r"1 output rows were left unwritten"),
    Planted(LosesPrecision, kit.check_compute, FLOAT32, r"error of the head"),
    Planted(LosesPrecision, kit.check_attend, FLOAT32, r"error of the head"),
    Planted(SpoilsOneRow, kit.check_compute, PLAIN, r"error of its worst row .*\(row 7\)"),
    Planted(ClearsDenseHeads, kit.check_compute, MIXED_HEADS, r"written in dense heads \[0, 4, 5\]"),
    Planted(WritesBehindARow, kit.check_compute, PLAIN, r"8 elements were written outside"),
    Planted(WritesBehindARow, kit.check_attend_all, PLAIN, r"8 elements were written outside"),
    Planted(ReadsUnusedMemory, kit.check_compute, PLAIN, r"unwritten or are not finite"),
    Planted(ReadsUnusedMemory, kit.check_attend_all, PAGED, r"unwritten or are not finite"),
    Planted(ComputesFromTheWrongPage, kit.check_compute, PAGED, r"the output of \d heads is off"),
    Planted(ShiftsTheMask, kit.check_compute, PLAIN, r"the output of 2 heads is off"),
    Planted(ShiftsTheMask, kit.check_attend_all, PLAIN, r"the output of 2 heads is off"),
    Planted(DependsOnTheCall, kit.check_chunks, cases.CHUNKS[0], r"chunks of 128 with state: .* outputs differ"),
    Planted(ContinuesWrongly, kit.check_chunks, cases.CHUNKS[0], r"chunks of 128 with state.* differ"),
    Planted(ContinuesWrongly, kit.check_appends, cases.CHUNKS[0], r"calls ending at \[1, 2, 33.* differ"),
    Planted(
        SelectsByTheCall, kit.check_profile_selection, cases.CHUNKS[0], r"rows 512 to 639: .* block decisions differ"
    ),
    Planted(
        SelectsByTheCall, kit.check_profile_calls, cases.CHUNKS[:1], r"chunks of 128 with state.* decisions differ"
    ),
    Planted(CentresByTheKeys, kit.check_profile_calls, [cases.END_TO_END[0]], r"nats from the threshold"),
    Planted(DependsOnThreads, kit.check_threads, Case(128, 192, 2, 1), r"2 threads: .* outputs differ"),
    Planted(SeesNeighbours, kit.check_ragged_batch, cases.RAGGED, r"sequence 0 of 4 in one pool: .*outputs differ"),
    Planted(QuantisesWholeBlocks, kit.check_ragged_batch, cases.RAGGED, r"in one pool"),
    Planted(HidesNonFinite, kit.check_non_finite_keys, cases.NON_FINITE[0], r"finite outputs differ"),
    Planted(HidesNonFinite, kit.check_non_finite_queries, cases.NON_FINITE[0], r"the row's output is finite"),
    Planted(SpreadsNonFinite, kit.check_non_finite_queries, cases.NON_FINITE[0], r"it shows in other rows"),
    Planted(DeclinesEverything, kit.unsupported, PLAIN, r"declined \(not today\)"),
]


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_a_planted_fault_is_caught_and_a_good_backend_is_not(planted: Planted) -> None:
    planted.run(ReferenceBackend())
    with pytest.raises(AssertionError) as caught:
        planted.run(planted.fault())
    assert re.search(planted.message, str(caught.value), re.DOTALL), str(caught.value)


def test_every_planted_fault_is_in_the_table() -> None:
    def leaves(fault: type[ReferenceBackend]) -> set[type[ReferenceBackend]]:
        below = [sub for sub in fault.__subclasses__() if sub.__module__ == __name__]
        return set().union(*map(leaves, below)) if below else {fault}

    assert leaves(ReferenceBackend) == {planted.fault for planted in PLANTED}


ORACLE_CASES = [*cases.EDGES, cases.HEADS[0], *cases.LAYOUTS[:2], *cases.POLICIES, *cases.EXTREMES, *cases.OPTIONAL[:1]]


@pytest.mark.parametrize("case", ORACLE_CASES, ids=str)
def test_the_expected_selection_is_the_naive_oracles(case: Case) -> None:
    inputs = problem(case)
    expected = naive_selection(
        inputs.query_codes,
        inputs.key_codes,
        inputs.thresholds,
        inputs.plan.strides,
        inputs.plan.unstrided_from,
        case,
        case.config,
        inputs.kv.keys,
    )
    assert np.array_equal(inputs.selection.mask().numpy(), expected)


def test_most_inputs_keep_between_a_twentieth_and_half_of_the_blocks() -> None:
    densities = []
    for case in [*cases.EDGES, *cases.HEADS, *cases.LAYOUTS, *cases.POLICIES]:
        inputs = problem(case)
        decisions = int(inputs.selectable_blocks().sum()) * case.batch
        if decisions >= 20:
            densities.append(int(inputs.selection.kept_blocks().sum()) / decisions)
    assert len(densities) >= 15
    assert sum(0.05 <= density <= 0.5 for density in densities) > 0.8 * len(densities)


@pytest.mark.parametrize("case", [PLAIN, *cases.LAYOUTS], ids=str)
def test_tokens_lie_where_the_page_table_says_and_poison_everywhere_else(case: Case) -> None:
    inputs = problem(case)
    kv = placed_kv(inputs, "cpu")
    assert torch.equal(kv.keys_between(0, case.tokens), inputs.kv.keys)
    assert torch.equal(kv.values_between(0, case.tokens), inputs.kv.values)
    assert int(kv.keys.isfinite().sum()) == inputs.kv.keys.numel()
    assert int(kv.values.isfinite().sum()) == inputs.kv.values.numel()
    assert (kv.keys.stride(1) < kv.keys.stride(2)) is (case.token_major and case.kv_heads > 1)
    codes = written_key_codes(inputs, inputs.key_codes)
    assert torch.equal(codes.gathered(case.tokens).codes, inputs.key_codes.codes)
    assert torch.equal(codes.gathered(case.tokens).scales, inputs.key_codes.scales)
    assert int((codes.codes != CODE_POISON).sum()) == inputs.key_codes.codes.numel()
    assert int(codes.scales.isfinite().sum()) == inputs.key_codes.scales.numel()
    assert not bool((empty_key_codes(inputs).codes != CODE_POISON).any())


def test_tied_inputs_have_ties_and_peaked_ones_one_hot_rows() -> None:
    ties = problem(TIES)
    quotients = ties.query.float() / ties.query_codes.scales.unsqueeze(-1)
    assert float((quotients.frac().abs() == 0.5).float().mean()) > 0.4
    peaked = problem(next(case for case in cases.VALUES if case.inputs == "peaked"))
    scores = peaked.query.double() @ peaked.kv.keys.double().transpose(2, 3) * peaked.scale
    assert float(torch.softmax(scores, dim=-1).amax(-1).median()) > 0.9


def test_a_case_names_what_it_differs_in() -> None:
    case = Case(5, 7, 4, 2, tau=(0.0, 0.5), config=SaleConfig(local_tokens=64), page_tokens=32)
    assert str(case) == ("5 rows behind 7, heads 4/2, tau 0.0/0.5, dense_rows 1024, centre_tokens 1024, page_tokens 32")
    every = [*cases.QUICK, *cases.SLOW]
    assert len({str(case) for case in every}) == len(every)
