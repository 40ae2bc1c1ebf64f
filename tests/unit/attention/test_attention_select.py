"""Selection: bit-equal to a naive oracle on every shape class, and the rules that shape it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sale_attention import HeadPlan, KeyCodes, LayerPolicy, QueryCodes, SaleConfig, Selection
from sale_attention.quantise import default_key_centre, quantise_key, quantise_query, query_block_means
from sale_attention.select import MAX_EXACT_HEAD_DIM, code_products, pack_mask, select_blocks, unpack_mask, voting_rows
from sale_attention.sink_local import row_thresholds, sink_local_log_sum_exp
from tests.unit.attention.naive import SMALL, Shape, grid_of, naive_selection, random_problem
from tests.unit.attention.naive import voting_rows as naive_voting_rows

ROWS = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300]
OFFSETS = [0, 1, 37, 64, 255, 300, 511]


def check_against_naive(
    shape: Shape,
    tau: list[float],
    strides: list[int],
    config: SaleConfig = SMALL,
    prompt_end: int | None = None,
    seed: int = 0,
) -> Selection:
    query, kv = random_problem(shape, seed=seed)
    grid = grid_of(shape, config)
    # Eighths, so that the 4-bit correction is exact whatever order its products are summed in.
    centre = (default_key_centre(kv, config) * 8).round() / 8
    means = (query_block_means(query, grid) * 8).round() / 8 if config.code_bits == 4 else None
    query_codes = quantise_query(query, grid, config, means)
    key_codes = quantise_key(kv, centre, config)
    policy = LayerPolicy(tau=torch.tensor(tau), query_stride=torch.tensor(strides))
    plan = HeadPlan.resolve(policy, config, shape.tokens if prompt_end is None else prompt_end)
    scale = shape.head_dim**-0.5
    lse = sink_local_log_sum_exp(query, kv, centre, grid, scale)
    thresholds = row_thresholds(lse, query_codes, policy.log_tau(), scale)
    selection = select_blocks(query_codes, key_codes, thresholds, plan, grid, kv)
    expected = naive_selection(
        query_codes, key_codes, thresholds, plan.strides, plan.unstrided_from, shape, config, kv.keys
    )
    assert np.array_equal(selection.mask().numpy(), expected)
    assert selection.kept_blocks().tolist() == expected.sum(axis=(0, 2, 3)).tolist()
    return selection


@pytest.mark.parametrize("rows", ROWS)
def test_rows_around_block_edges_at_every_offset(rows: int) -> None:
    for offset in OFFSETS:
        check_against_naive(Shape(rows=rows, offset=offset), [0.05, 0.05], [1, 1], seed=rows + offset)


@pytest.mark.parametrize("heads_per_kv_head", [1, 3, 6, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_grouped_heads_head_dims_and_batches(heads_per_kv_head: int, head_dim: int) -> None:
    shape = Shape(130, 101, 2 * heads_per_kv_head, 2, head_dim, batch=2)
    selection = check_against_naive(shape, [0.05] * shape.heads, [1] * shape.heads)
    assert 0 < int(selection.kept_blocks().sum()) < selection.mask().numel() // 2


@pytest.mark.parametrize("prompt_end", [None, 300, 2000])
def test_strides_per_head_with_and_without_the_prompts_tail(prompt_end: int | None) -> None:
    for offset in (0, 37, 130):
        check_against_naive(Shape(300, offset, 6, 2), [0.05] * 6, [1, 2, 4, 4, 1, 2], prompt_end=prompt_end)


@pytest.mark.parametrize("offset", [201, 202, 203, 204])
def test_an_append_too_short_for_the_stride_lets_every_row_vote(offset: int) -> None:
    for rows in (1, 2, 3):
        check_against_naive(Shape(rows, offset), [0.05, 0.05], [4, 2], prompt_end=4096)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_four_bit_codes_with_the_correction_of_centred_queries(head_dim: int) -> None:
    config = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, code_bits=4)
    for rows, offset in ((130, 101), (300, 0), (33, 290)):
        selection = check_against_naive(Shape(rows, offset, 3, 1, head_dim), [0.05] * 3, [1, 2, 4], config)
        assert int(selection.kept_blocks().sum()) > 0


def test_a_row_equal_to_its_blocks_mean_is_judged_by_the_correction_alone() -> None:
    config = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, code_bits=4)
    shape = Shape(rows=1, offset=500, heads=1)
    query, kv = random_problem(shape)
    kv.keys[:, :, 100] = query[:, :, 0]
    grid, centre, scale = grid_of(shape), default_key_centre(kv, config), shape.head_dim**-0.5
    codes = quantise_query(query, grid, config)
    assert int(codes.codes.abs().max()) == 0
    policy = LayerPolicy.uniform(1, tau=2.0)
    thresholds = row_thresholds(sink_local_log_sum_exp(query, kv, centre, grid, scale), codes, policy.log_tau(), scale)
    plan = HeadPlan.resolve(policy, config, shape.tokens)
    selection = select_blocks(codes, quantise_key(kv, centre, config), thresholds, plan, grid, kv)
    matching_keys = (kv.keys[0, 0] == query[0, 0, 0]).all(-1).nonzero().flatten()
    assert selection.block_list(0, 0, 0).tolist() == (matching_keys // 32).tolist()


def test_query_blocks_of_128() -> None:
    config = SaleConfig(query_block=128, dense_rows=128, centre_tokens=64)
    for rows, offset in ((300, 0), (129, 257), (5, 600)):
        check_against_naive(Shape(rows, offset), [0.02, 0.1], [1, 4], config)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 200),
    offset=st.integers(0, 400),
    group=st.sampled_from([1, 2, 3]),
    bits=st.sampled_from([4, 8]),
    tau=st.lists(st.sampled_from([0.0, 0.004, 0.03, 0.2, math.inf]), min_size=6, max_size=6),
    strides=st.lists(st.sampled_from([1, 2, 4]), min_size=6, max_size=6),
    local_blocks=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_selection_equals_the_oracle(
    rows: int, offset: int, group: int, bits: int, tau: list[float], strides: list[int], local_blocks: int, seed: int
) -> None:
    config = SaleConfig(local_tokens=32 * local_blocks, dense_rows=64, centre_tokens=64, code_bits=bits)
    shape = Shape(rows, offset, 2 * group, 2, head_dim=16)
    check_against_naive(shape, tau[: shape.heads], strides[: shape.heads], config, seed=seed)


def threshold_problem(threshold: float, shape: Shape, tau: float = 0.1) -> tuple[QueryCodes, KeyCodes, Selection]:
    query, kv = random_problem(shape)
    grid = grid_of(shape)
    query_codes = quantise_query(query, grid, SMALL)
    key_codes = quantise_key(kv, default_key_centre(kv, SMALL), SMALL)
    plan = HeadPlan.resolve(LayerPolicy.uniform(shape.heads, tau), SMALL, shape.tokens)
    thresholds = torch.full((shape.batch, shape.heads, shape.rows), threshold)
    return query_codes, key_codes, select_blocks(query_codes, key_codes, thresholds, plan, grid, kv)


@pytest.mark.parametrize(("threshold", "everything"), [(-math.inf, True), (math.nan, True), (math.inf, False)])
def test_what_is_not_provably_below_the_threshold_is_kept(threshold: float, everything: bool) -> None:
    shape = Shape(rows=300)
    _, _, selection = threshold_problem(threshold, shape)
    grid = grid_of(shape)
    expected = torch.zeros(grid.query_blocks, grid.key_blocks, dtype=torch.bool)
    for index in range(grid.query_blocks):
        start, end = grid.selectable(index)
        expected[index, start:end] = everything
    assert torch.equal(selection.mask()[0, 0], expected)


@pytest.mark.parametrize("tau", [0.0, math.inf])
def test_dense_and_streaming_heads_are_not_estimated(tau: float) -> None:
    _, _, selection = threshold_problem(-math.inf, Shape(rows=300), tau)
    assert int(selection.kept_blocks().sum()) == 0


def test_a_score_equal_to_the_threshold_is_not_kept() -> None:
    shape = Shape(rows=64, offset=256, heads=1)
    query_codes, key_codes, _ = threshold_problem(0.0, shape)
    products = query_codes.codes[0, 0].int() @ key_codes.codes[0, 0, 64:96].int().t()
    largest = products.amax().float() * key_codes.scales[0, 0, 2]
    for threshold, kept in ((largest, False), (torch.nextafter(largest, torch.tensor(-math.inf)), True)):
        _, _, selection = threshold_problem(threshold.item(), shape)
        assert bool(selection.mask()[0, 0, 0, 2]) is kept


def test_threshold_arithmetic_is_pinned_and_survives_an_all_zero_row() -> None:
    generator = torch.Generator().manual_seed(0)
    lse, scales = torch.randn(1, 2, 50, generator=generator), torch.rand(1, 2, 50, generator=generator) + 0.01
    scales[0, 0, 0] = torch.finfo(torch.float32).tiny
    policy = LayerPolicy(tau=torch.tensor([0.004, 0.3]), query_stride=torch.tensor([1, 1]))
    codes = QueryCodes(torch.zeros(1, 2, 50, 64, dtype=torch.int8), scales)
    result = row_thresholds(lse, codes, policy.log_tau(), 128**-0.5).numpy()
    log_tau = np.log(np.array([0.004, 0.3], dtype=np.float32).astype(np.float64)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = (log_tau[None, :, None] + lse.numpy()) / np.float32(128**-0.5) / scales.numpy()
    assert np.array_equal(result, expected)
    assert not np.isnan(result).any()


@pytest.mark.parametrize("shape", [Shape(300), Shape(65, 37, 3, 1, 96), Shape(1, 500), Shape(200, 64, 4, 2, batch=2)])
def test_sink_local_log_sum_exp_against_float64(shape: Shape) -> None:
    query, kv = random_problem(shape)
    grid, scale = grid_of(shape), 0.11
    centre = default_key_centre(kv, SMALL)
    result = sink_local_log_sum_exp(query, kv, centre, grid, scale)
    keys = (kv.keys.double() - centre.double().unsqueeze(2)).repeat_interleave(shape.heads // shape.kv_heads, dim=1)
    scores = (query.double() @ keys.transpose(2, 3)) * scale
    for row in range(shape.rows):
        position = shape.offset + row
        local_start = max(0, position // 64 * 64 - 64)
        chosen = [j for j in range(position + 1) if j < 32 or j >= local_start]
        exact = torch.logsumexp(scores[:, :, row, chosen], dim=-1)
        torch.testing.assert_close(result[:, :, row].double(), exact, atol=1e-5, rtol=1e-6)


def test_estimate_agrees_with_exact_scores_but_for_blocks_at_the_threshold() -> None:
    shape = Shape(rows=600, heads=3)
    query, kv = random_problem(shape, seed=3)
    grid, scale, tau = grid_of(shape), shape.head_dim**-0.5, 0.05
    selection = check_against_naive(shape, [tau] * 3, [1] * 3, seed=3)
    centre = (default_key_centre(kv, SMALL) * 8).round() / 8
    lse = sink_local_log_sum_exp(query, kv, centre, grid, scale).double()
    keys = kv.keys.double() - centre.double().unsqueeze(2)
    margin = (query.double() @ keys.transpose(2, 3)) * scale - lse.unsqueeze(-1) - math.log(tau)
    for index in range(grid.query_blocks):
        start, end = grid.rows(index)
        for block in range(*grid.selectable(index)):
            largest = margin[:, :, start:end, block * 32 : block * 32 + 32].amax(dim=(2, 3))
            kept = selection.mask()[:, :, index, block]
            assert bool(kept[largest > 0.1].all())
            assert not bool(kept[largest < -0.1].any())


def test_mask_words_hold_32_blocks_each_and_round_trip() -> None:
    mask = torch.rand(2, 3, 77, generator=torch.Generator().manual_seed(0)) < 0.5
    words = pack_mask(mask)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, 3)
    assert torch.equal(unpack_mask(words, 77), mask)
    single = torch.zeros(64, dtype=torch.bool)
    single[[0, 31, 33]] = True
    assert pack_mask(single).tolist() == [1 - 2**31, 2]


@pytest.mark.parametrize("density", [0.0, 0.03, 0.9, 1.0])
def test_kept_blocks_counts_the_set_bits_of_each_head(density: float) -> None:
    mask = torch.rand(2, 3, 5, 333, generator=torch.Generator().manual_seed(0)) < density
    assert torch.equal(Selection(pack_mask(mask), 333).kept_blocks(), mask.sum(dim=(0, 2, 3)))


def test_block_list_is_ascending() -> None:
    mask = torch.zeros(1, 1, 1, 70, dtype=torch.bool)
    mask[..., [3, 31, 32, 69]] = True
    assert Selection(pack_mask(mask), 70).block_list(0, 0, 0).tolist() == [3, 31, 32, 69]


@pytest.mark.parametrize("head_dim", [16, 64, 256, MAX_EXACT_HEAD_DIM])
def test_code_products_are_exact_on_both_paths(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-127, 128, (n, head_dim), generator=generator, dtype=torch.int8) for n in (33, 70))
    query[0], key[0], key[1] = 127, 127, -127
    expected = query.long() @ key.long().t()
    assert torch.equal(code_products(query, key).long(), expected)
    monkeypatch.setattr("sale_attention.select._int8_matmul_is_exact", lambda codes: False)
    assert torch.equal(code_products(query, key).long(), expected)


def test_rows_that_vote() -> None:
    shape = Shape(rows=140, offset=50)
    plan = HeadPlan(strides=(4,), dense=(False,), unstrided_from=128)
    grid = grid_of(shape)
    rows = [row for index in range(grid.query_blocks) for row in voting_rows(grid, plan, 4, index)]
    assert rows == naive_voting_rows(shape, 4, 128, 64)
    assert [shape.offset + row for row in rows[:3]] == [52, 56, 60]
