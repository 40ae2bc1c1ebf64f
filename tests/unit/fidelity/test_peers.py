"""Selection rules of SALE and its peers on queries and keys whose right mask is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sale_attention import BlockGrid, HeadPlan, KvView, LayerPolicy, SaleConfig
from sale_attention.quantise import default_key_centre, quantise_key, quantise_query
from sale_attention.sampled import add_sampled
from sale_attention.select import select_blocks
from sale_attention.sink_local import row_thresholds, sink_local_log_sum_exp
from sale_fidelity.peers import (
    FlexPrefill,
    Head,
    Levels,
    Sale,
    SelectionRule,
    SpargeAttn,
    StreamingLlm,
    VerticalSlash,
    XAttention,
    methods,
    solve_shared,
)
from sale_fidelity.peers.errors import BlockSample, ErrorSummary, sampled_blocks
from sale_fidelity.peers.flexprefill import jensen_shannon_distance
from sale_fidelity.peers.minference import diagonal_sums
from sale_fidelity.peers.rule import block_means, cumulative_levels
from sale_fidelity.peers.sale import _sink_local_log_sum_exp
from sale_fidelity.peers.spargeattn import self_similarity

TOKENS = 2048
DIM = 64
RULES = [rule for method in methods() for rule in method.rules]


def noise(tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys that prefer nothing much."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(0.3 * torch.randn(tokens, DIM, generator=generator) for _ in range(2))  # type: ignore[return-value]


def head_of(query: Tensor, keys: Tensor, first_row: int = 1024) -> Head:
    return Head(query, keys, 1 / math.sqrt(DIM), first_row)


def plant(query: Tensor, keys: Tensor, rows: Sequence[int] | slice, columns: Sequence[int] | slice) -> None:
    """Lets `rows` attend to `columns` with nearly all of their mass."""
    direction = torch.zeros(DIM)
    direction[:4] = 1.0
    query[rows] += 12 * direction
    keys[columns] += 12 * direction


def column() -> Head:
    """Every row attends to key 700: a vertical line."""
    query, keys = noise()
    plant(query, keys, slice(0, TOKENS), [700])
    return head_of(query, keys)


def diagonal(distance: int = 512) -> Head:
    """Every row attends to the key `distance` before it: a slash."""
    generator = torch.Generator().manual_seed(1)
    marks = torch.nn.functional.normalize(torch.randn(TOKENS + distance, DIM, generator=generator), dim=-1)
    return head_of(24 * marks[:TOKENS], 24 * marks[distance:])


def square() -> Head:
    """Rows 1536 .. 1663 attend to keys 640 .. 767: a block of 128 by 128."""
    query, keys = noise()
    plant(query, keys, slice(1536, 1664), slice(640, 768))
    return head_of(query, keys)


def needle() -> Head:
    """Row 1601 alone attends to key 705 alone; every row a little to all keys from 128 to 255."""
    query, keys = noise()
    query[:, -4:] += 1
    keys[128:256, -4:] += 1
    plant(query, keys, [1601], [705])
    return head_of(query, keys)


def keeps(levels: Levels, row: int, key: int, knob: float) -> bool:
    return key in levels.kept_keys((row - levels.first_row) // 64, knob).tolist()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} {rule.setting}")
class TestEveryRule:
    def test_keeps_nothing_of_the_future_and_always_the_rows_own_keys(self, rule: SelectionRule) -> None:
        levels = rule.levels(head_of(*noise()))
        for index in range(levels.query_blocks):
            start, end = levels.rows(index)
            kept = levels.kept_keys(index, levels.solve(0.5))
            assert int(kept.max()) == end - 1
            assert set(range(start, end)) <= set(kept.tolist())
            assert not levels.kept(math.inf)[index, -(-end // levels.key_block) :].any()

    def test_keeps_the_first_keys_at_any_density(self, rule: SelectionRule) -> None:
        levels = rule.levels(head_of(*noise()))
        for index in range(levels.query_blocks):
            assert set(range(32)) <= set(levels.kept_keys(index, -math.inf).tolist())

    def test_everything_is_kept_at_the_largest_knob(self, rule: SelectionRule) -> None:
        levels = rule.levels(head_of(*noise()))
        assert levels.density(math.inf) == pytest.approx(1.0)
        assert levels.kept_keys(3, math.inf).tolist() == list(range(1024 + 4 * 64))

    def test_reaches_a_density_asked_for(self, rule: SelectionRule) -> None:
        query, keys = noise()
        levels = rule.levels(
            head_of(query + 2, keys + 2)
        )  # tokens alike, for SpargeAttn to judge blocks by their means
        for density in (0.4, 0.6, 0.8):
            knob = levels.solve(density)
            assert levels.density(knob) == pytest.approx(density, abs=0.025)  # 2K tokens: blocks of 128 are coarse
            kept = sum(len(levels.kept_keys(index, knob)) * 64 for index in range(levels.query_blocks))
            visible = sum(levels.rows(index)[1] * 64 for index in range(levels.query_blocks))
            assert levels.density(knob) == pytest.approx(kept / visible)

    def test_keeps_at_a_larger_knob_what_it_kept_at_a_smaller_one(self, rule: SelectionRule) -> None:
        levels = rule.levels(head_of(*noise()))
        few, many = levels.kept(levels.solve(0.3)), levels.kept(levels.solve(0.6))
        assert bool((few <= many).all())

    def test_gives_the_same_levels_again(self, rule: SelectionRule) -> None:
        head = head_of(*noise())
        assert torch.equal(rule.levels(head).values, rule.levels(head).values)

    def test_takes_a_prompt_that_ends_inside_a_block(self, rule: SelectionRule) -> None:
        levels = rule.levels(head_of(*noise(1999), first_row=512))
        assert levels.rows(levels.query_blocks - 1) == (1984, 1999)
        assert int(levels.kept_keys(levels.query_blocks - 1, -math.inf).max()) == 1998

    def test_costs_less_than_dense_attention(self, rule: SelectionRule) -> None:
        assert 0 <= rule.cost(32768, 128).share(32768, 128) < 0.3


class TestVerticalLine:
    @pytest.mark.parametrize(
        "rule",
        [Sale(), Sale(4), VerticalSlash((500, 1500)), FlexPrefill(), XAttention(8), XAttention(16)],
        ids=lambda rule: f"{rule.name} {rule.setting}",
    )
    def test_is_kept_for_every_row_before_anything_else(self, rule: SelectionRule) -> None:
        levels = rule.levels(column())
        knob = levels.solve(levels.least_density + 0.11)
        assert all(keeps(levels, row, 700, knob) for row in range(1024, TOKENS, 64))

    def test_costs_minference_one_key_a_query_block(self) -> None:
        levels = VerticalSlash((3000, 200)).levels(column())
        added = levels.kept(1 / 3000).sum(dim=1) - levels.kept(-math.inf).sum(dim=1)
        assert added.tolist() == [1] * levels.query_blocks

    def test_is_not_kept_by_a_window_that_does_not_reach_it(self) -> None:
        assert not keeps(StreamingLlm().levels(column()), 1600, 700, knob=256)


class TestSlash:
    def test_is_minferences_first_slash(self) -> None:
        levels = VerticalSlash((30, 2048)).levels(diagonal(512))
        kept = levels.kept(1 / 2048)[8]  # rows 1536 .. 1599
        always = levels.kept(-math.inf)[8]
        assert (kept & ~always).nonzero().squeeze(1).tolist() == list(range(1024, 1088))

    def test_makes_flexprefill_keep_the_block_diagonal(self) -> None:
        head = diagonal(512)
        assert not FlexPrefill().is_query_aware(head)
        levels = FlexPrefill().levels(head)
        kept = levels.kept(0.0)
        assert all(bool(kept[index, index // 2 + 8 - 4]) for index in range(levels.query_blocks))

    @pytest.mark.parametrize("rule", [Sale(), XAttention(8)], ids=lambda rule: rule.name)
    def test_is_found_by_rules_that_look_at_every_row(self, rule: SelectionRule) -> None:
        levels = rule.levels(diagonal(511))
        knob = levels.solve(levels.least_density + 0.2)
        assert all(keeps(levels, row, row - 511, knob) for row in range(1024, TOKENS, 32))

    def test_of_even_distance_lies_between_the_antidiagonals_of_an_even_stride(self) -> None:
        seen, missed = (XAttention(8)._block_mass(diagonal(distance))[4, 8] for distance in (511, 512))
        assert float(missed) < 0.2 * float(seen)


class TestBlock:
    @pytest.mark.parametrize("stride", [1, 2, 4])
    def test_is_all_that_sale_adds(self, stride: int) -> None:
        levels = Sale(stride).levels(square())
        added = levels.kept(levels.solve(levels.least_density + 0.0102)) & ~levels.kept(-math.inf)
        assert added.nonzero().tolist() == [[block, column] for block in (8, 9) for column in range(20, 24)]

    @pytest.mark.parametrize("rule", [XAttention(8), XAttention(16), SpargeAttn(-1.0)], ids=lambda rule: rule.setting)
    def test_is_the_first_that_rules_by_mass_add_for_its_rows(self, rule: SelectionRule) -> None:
        levels = rule.levels(square())
        added = levels.kept_keys(8, 1e-6).tolist()
        assert set(added) & set(range(640, 768))
        assert set(levels.kept_keys(8, 0.6).tolist()) >= set(range(640, 768))
        assert len(levels.kept_keys(8, 0.6)) <= len(levels.kept_keys(8, -math.inf)) + 128

    def test_that_the_last_rows_do_not_attend_to_is_nothing_to_minference(self) -> None:
        levels = VerticalSlash((500, 1500)).levels(square())
        first = float(levels.values[8, 640:768].min())
        assert levels.density(first) > levels.least_density + 0.0105

    def test_of_unlike_keys_is_computed_by_spargeattn(self) -> None:
        query, keys = noise()
        keys[:] = 1.0
        generator = torch.Generator().manual_seed(2)
        keys[640:704] = torch.randn(64, DIM, generator=generator)
        levels = SpargeAttn(0.6).levels(head_of(torch.ones_like(query), keys))
        assert bool((levels.values[:, 10] == -math.inf).all())
        assert bool((levels.values[-1, 11:14] > -math.inf).all())


class TestNeedle:
    def test_is_kept_by_sale_before_anything_else(self) -> None:
        levels = Sale().levels(needle())
        assert keeps(levels, 1601, 705, levels.solve(levels.least_density + 0.002))

    def test_is_not_seen_by_a_stride_that_skips_its_row(self) -> None:
        levels = Sale(4).levels(needle())
        assert not keeps(levels, 1601, 705, levels.solve(levels.least_density + 0.002))

    @pytest.mark.parametrize("rule", [SpargeAttn(-1.0), XAttention(16)], ids=lambda rule: rule.name)
    def test_is_worth_a_large_error_where_pooling_hides_it(self, rule: SelectionRule) -> None:
        head = needle()
        values = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3))
        block = BlockSample.of(head, values, (1601 - 1024) // 64)
        ours = Sale().levels(head)
        theirs = rule.levels(head)
        density = max(ours.least_density, theirs.least_density) + 0.002
        assert float(block.row_errors(ours, ours.solve(density))[1]) < 0.05
        assert float(block.row_errors(theirs, theirs.solve(density))[1]) > 0.5


class TestSale:
    @pytest.mark.parametrize(("stride", "sample_stride"), [(1, 0), (1, 32), (2, 32), (4, 64)])
    def test_keeps_what_the_library_selects(self, stride: int, sample_stride: int) -> None:
        query, keys = noise()
        plant(query, keys, slice(1536, 1664), slice(640, 768))
        head, config = head_of(query, keys), SaleConfig(sample_stride=sample_stride)
        rule = Sale(stride, config)
        levels = rule.levels(head)
        knob = levels.solve(0.5)

        rows = TOKENS - head.first_row
        grid, kv = BlockGrid.of(rows, TOKENS, config), KvView(keys[None, None], keys[None, None])
        policy = LayerPolicy.uniform(1, tau=rule.tau(knob), query_stride=stride)
        codes = quantise_query(query[None, None, -rows:], grid, config)
        centre = default_key_centre(kv, config)
        lse = sink_local_log_sum_exp(query[None, None, -rows:], kv, centre, grid, head.scale)
        key_codes = quantise_key(kv, centre, config)
        if sample_stride:
            add_sampled(lse, codes, key_codes, grid, sample_stride, head.scale)
        thresholds = row_thresholds(lse, codes, policy.log_tau(), head.scale)
        plan = HeadPlan.resolve(policy, config, TOKENS)
        expected = select_blocks(codes, key_codes, thresholds, plan, grid, kv).mask()[0, 0]

        differing = expected != (levels.kept(knob) & (levels.values > -math.inf))
        assert int(differing.sum()) <= 1  # the block whose score is the threshold itself
        assert int(expected.sum()) > 100

    @pytest.mark.parametrize("tokens", [TOKENS, 1999])
    def test_takes_sink_and_local_keys_as_the_library_does(self, tokens: int) -> None:
        query, keys = noise(tokens)
        head, config = head_of(query, keys, first_row=512), SaleConfig()
        grid, kv = BlockGrid.of(tokens - 512, tokens, config), KvView(keys[None, None], keys[None, None])
        centre = default_key_centre(kv, config)
        expected = sink_local_log_sum_exp(query[None, None, 512:], kv, centre, grid, head.scale)[0, 0]
        torch.testing.assert_close(_sink_local_log_sum_exp(head, centre[0, 0], grid), expected)

    def test_refuses_a_geometry_that_does_not_compare(self) -> None:
        with pytest.raises(ValueError, match="query blocks of 64 and 8-bit codes"):
            Sale(config=SaleConfig(query_block=128)).levels(head_of(*noise()))
        with pytest.raises(ValueError, match="first_row=128 is below 160"):
            Sale().levels(head_of(*noise(), first_row=128))


class TestParts:
    def test_diagonal_sums_are_by_distance_of_row_and_key(self) -> None:
        attention = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])  # rows 1 and 2 of three tokens
        assert diagonal_sums(attention).tolist() == [2.0 + 5.0, 1.0 + 4.0, 3.0]

    def test_cumulative_levels_leave_an_elements_own_mass_out(self) -> None:
        levels = cumulative_levels(torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 0.0]]))
        assert torch.allclose(levels, torch.tensor([[0.8, 0.0, 0.5], [0.0, 0.0, 0.0]]))

    def test_block_means_count_the_rows_there_are(self) -> None:
        assert block_means(torch.tensor([[1.0], [3.0], [5.0]]), 2).tolist() == [[2.0], [5.0]]

    def test_self_similarity_is_one_for_equal_rows_and_least_for_opposite_ones(self) -> None:
        rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        assert self_similarity(rows, 2).tolist() == [1.0, 0.0]

    def test_jensen_shannon_distance_of_disjoint_distributions_is_the_root_of_ln_2(self) -> None:
        first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        assert float(jensen_shannon_distance(first, first)) == 0.0
        assert float(jensen_shannon_distance(first, second)) == pytest.approx(math.sqrt(math.log(2)))

    def test_one_knob_for_several_heads_meets_their_mean_density(self) -> None:
        heads = [Sale().levels(head_of(*noise(seed=seed))) for seed in range(3)]
        knob = solve_shared([levels.curve for levels in heads], 0.5)
        assert sum(levels.density(knob) for levels in heads) / 3 == pytest.approx(0.5, abs=0.01)

    def test_head_and_levels_say_what_does_not_fit(self) -> None:
        query, keys = noise()
        with pytest.raises(ValueError, match="first_row=100 must be a multiple of 128"):
            Head(query, keys, 1.0, 100)
        with pytest.raises(ValueError, match=r"must both be \[tokens, head_dim\]"):
            Head(query, keys[:-1], 1.0)
        with pytest.raises(ValueError, match=r"levels have shape \(3, 4\), not \(16, 64\)"):
            Levels(torch.zeros(3, 4), 32, head_of(query, keys))


class TestErrors:
    def test_a_mask_that_keeps_everything_has_none(self) -> None:
        head = column()
        values = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3))
        levels = StreamingLlm().levels(head)
        block = BlockSample.of(head, values, 5)
        assert float(block.row_errors(levels, math.inf).max()) < 1e-5
        expected = torch.nn.functional.scaled_dot_product_attention(
            head.query[None], head.keys[None], values[None], is_causal=True, scale=head.scale
        )[0, 1024 + 5 * 64 : 1024 + 6 * 64]
        assert torch.allclose(block.dense, expected, atol=1e-5)

    def test_sampled_blocks_are_spread_and_favour_no_end(self) -> None:
        assert sampled_blocks(8, 4) == [1, 3, 5, 7]
        assert sampled_blocks(384, 4) == [48, 144, 240, 336]
        assert sampled_blocks(3, 48) == [0, 1, 2]

    def test_p99_is_the_least_error_that_99_of_100_rows_do_not_exceed(self) -> None:
        assert ErrorSummary.of(torch.arange(100.0)).p99 == 98.0
        assert ErrorSummary.of(torch.tensor([7.0])) == ErrorSummary(7.0, 7.0, 7.0)
