"""What a sample of the keys between sink and local ones adds to a row's sum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sale_attention import AttentionStatistics, BlockGrid, KvView, LayerPolicy, SaleConfig, attend
from sale_attention.quantise import KeyCodes, QueryCodes, default_key_centre, quantise_key, quantise_query
from sale_attention.sampled import add_sampled, sampled_positions
from sale_attention.sink_local import sink_local_log_sum_exp
from tests.unit.attention.naive import SMALL, Shape, random_problem

CONFIG = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, sample_stride=32)


def test_sampled_keys_lie_between_sink_and_local_ones_one_in_each_stretch() -> None:
    grid = BlockGrid.of(64, 512, CONFIG)  # rows 448 to 511; local keys from 384 on
    assert list(sampled_positions(grid, 0, 32)) == list(range(48, 384, 32))
    assert list(sampled_positions(grid, 0, 96)) == [48, 144, 240, 336]
    assert not sampled_positions(BlockGrid.of(64, 128, CONFIG), 0, 32)


def test_with_equal_scores_the_sample_weighs_what_all_keys_between_weigh() -> None:
    """All products are 0, so each of the 512 - 32 - 64 - 64 = 352 keys between adds exp(0)."""
    grid = BlockGrid.of(64, 512, CONFIG)
    zeros = torch.zeros(1, 1, 512, 64, dtype=torch.int8)
    codes = QueryCodes(zeros[:, :, :64], torch.ones(1, 1, 64))
    keys = KeyCodes(zeros, torch.ones(1, 1, 16), torch.zeros(1, 1, 64))
    lse = torch.full((1, 1, 64), math.log(100.0))
    add_sampled(lse, codes, keys, grid, 32, 0.125)
    torch.testing.assert_close(lse, torch.full((1, 1, 64), math.log(100.0 + 352.0)))


def test_a_sampled_sum_is_near_the_rows_whole_sum() -> None:
    query, kv = random_problem(Shape(64, 4032, heads=2), seed=1)
    grid = BlockGrid.of(64, 4096, CONFIG)
    centre = default_key_centre(kv, CONFIG)
    codes, scale = quantise_query(query, grid, CONFIG), 64**-0.5
    lse = sink_local_log_sum_exp(query, kv, centre, grid, scale)
    before = lse.clone()
    add_sampled(lse, codes, quantise_key(kv, centre, CONFIG), grid, 32, scale)
    scores = query.float() * scale @ (kv.keys.float() - centre.unsqueeze(2)).repeat_interleave(2, 1)[:, :2].mT
    future = torch.ones(64, 4096, dtype=torch.bool).triu(4033)
    whole = scores.masked_fill(future, -math.inf).logsumexp(dim=-1)
    assert float((whole - before).mean()) > 2.0
    assert abs(float((whole - lse).mean())) < 0.3


def test_a_row_whose_mass_is_elsewhere_keeps_fewer_blocks() -> None:
    query, kv = random_problem(Shape(512, 1536, heads=2), seed=2)

    def density(sample_stride: int) -> float:
        statistics = AttentionStatistics()
        policy = LayerPolicy.uniform(2, tau=0.01)
        config = replace(SMALL, sample_stride=sample_stride)
        attend(query, kv, policy=policy, config=config, statistics=statistics, backend="reference")
        return statistics.density

    assert density(32) < 0.8 * density(0)


def test_strides_that_no_kernel_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="sample_stride=32 needs code_bits=8, not 4"):
        SaleConfig(code_bits=4, sample_stride=32)
    with pytest.raises(ValueError, match="sample_stride=48 must be a multiple of key_block=32"):
        SaleConfig(sample_stride=48)
    with pytest.raises(ValueError, match="sample_stride=2147483648 must be 0 to"):
        SaleConfig(sample_stride=1 << 31)


def test_a_sample_beyond_float32_judges_nothing() -> None:
    """Not infinity: no key would reach a threshold relative to that."""
    grid = BlockGrid.of(64, 512, CONFIG)
    ones = torch.ones(1, 1, 512, 64, dtype=torch.int8)
    codes = QueryCodes(ones[:, :, :64], torch.full((1, 1, 64), 1e30))
    keys = KeyCodes(ones, torch.full((1, 1, 16), 1e30), torch.zeros(1, 1, 64))
    lse = torch.zeros(1, 1, 64)
    add_sampled(lse, codes, keys, grid, 32, 0.125)
    assert lse.isnan().all()


def test_a_nan_key_is_never_hidden() -> None:
    query, kv = random_problem(Shape(256, 1792, heads=2), seed=3)
    keys = kv.keys.clone()
    keys[:, :, 48] = math.nan  # a sampled one
    broken = KvView(keys, kv.values)
    result = attend(query, broken, config=CONFIG, policy=LayerPolicy.uniform(2), backend="reference")
    assert result.output.isnan().all()
