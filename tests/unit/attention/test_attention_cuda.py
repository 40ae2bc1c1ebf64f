"""The reference on a GPU: codes and selection of the CPU bit for bit, and its output but for rounding."""

from __future__ import annotations

import pytest
import torch

from sale_attention import (
    AttentionStatistics,
    KvView,
    LayerPolicy,
    LayerState,
    QueryCodes,
    SaleConfig,
    attend,
)
from sale_attention.dense import dense_attention
from sale_attention.quantise import KeyCodes, default_key_centre, quantise_key, quantise_query, query_block_means
from sale_attention.select import select_blocks
from sale_attention.sink_local import row_thresholds, sink_local_log_sum_exp
from tests.unit.attention.naive import SMALL, Shape, causal_mask, exact_attention, grid_of, plan_for, random_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FOUR_BIT = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, code_bits=4)


def to_gpu(kv: KvView) -> KvView:
    return KvView(kv.keys.cuda(), kv.values.cuda())


@pytest.mark.parametrize("config", [SMALL, FOUR_BIT], ids=["8-bit", "4-bit"])
@pytest.mark.parametrize("shape", [Shape(300, 101, 6, 2, 128, 2), Shape(65, 500, 3, 1, 96)])
def test_codes_and_selection_are_those_of_the_cpu(shape: Shape, config: SaleConfig) -> None:
    query, kv = random_problem(shape)
    grid, scale = grid_of(shape, config), shape.head_dim**-0.5
    policy, plan = plan_for(shape, 0.05)
    centre = (default_key_centre(kv, config) * 8).round() / 8
    means = (query_block_means(query, grid) * 8).round() / 8 if config.code_bits == 4 else None
    query_codes, key_codes = quantise_query(query, grid, config, means), quantise_key(kv, centre, config)
    lse = sink_local_log_sum_exp(query, kv, centre, grid, scale)
    thresholds = row_thresholds(lse, query_codes, policy.log_tau(), scale)

    gpu_means = None if means is None else means.cuda()
    gpu_query_codes = quantise_query(query.cuda(), grid, config, gpu_means)
    gpu_key_codes = quantise_key(to_gpu(kv), centre.cuda(), config)
    for ours, theirs in ((query_codes, gpu_query_codes), (key_codes, gpu_key_codes)):
        assert isinstance(ours, QueryCodes | KeyCodes)
        assert torch.equal(ours.codes, theirs.codes.cpu())
        assert torch.equal(ours.scales, theirs.scales.cpu())
    gpu_lse = sink_local_log_sum_exp(query.cuda(), to_gpu(kv), centre.cuda(), grid, scale)
    torch.testing.assert_close(gpu_lse.cpu(), lse, atol=1e-5, rtol=1e-6)
    gpu_thresholds = row_thresholds(lse.cuda(), gpu_query_codes, policy.log_tau(), scale)
    assert torch.equal(gpu_thresholds.cpu(), thresholds)

    selection = select_blocks(query_codes, key_codes, thresholds, plan, grid, kv)
    gpu_selection = select_blocks(gpu_query_codes, gpu_key_codes, gpu_thresholds, plan, grid, to_gpu(kv))
    assert int(selection.kept_blocks().sum()) > 0
    assert torch.equal(selection.words, gpu_selection.words.cpu())


def test_attend_agrees_with_the_cpu_and_reports_its_phases() -> None:
    shape = Shape(500, 100, 6, 2, 128)
    query, kv = random_problem(shape)
    tau = torch.tensor([0.0, 0.05, 0.05, 0.05, torch.inf, 0.05])
    policy = LayerPolicy(tau=tau, query_stride=torch.tensor([1, 2, 4, 1, 2, 4]))
    statistics, cpu_statistics = AttentionStatistics(), AttentionStatistics()
    expected = attend(query, kv, policy=policy, config=SMALL, statistics=cpu_statistics)
    result = attend(query.cuda(), to_gpu(kv), policy=policy, config=SMALL, state=LayerState(), statistics=statistics)
    torch.testing.assert_close(result.output.cpu(), expected.output, atol=2e-2, rtol=2e-2)
    assert result.lse is not None
    assert expected.lse is not None
    torch.testing.assert_close(result.lse.cpu(), expected.lse, atol=1e-4, rtol=1e-4)
    assert torch.equal(statistics.causal_blocks[0], cpu_statistics.causal_blocks[0])
    assert statistics.density == pytest.approx(cpu_statistics.density, rel=0.01)
    assert all(seconds > 0 for seconds in statistics.phase_seconds.values())


@pytest.mark.parametrize("shape", [Shape(1, 300, 6, 2), Shape(300, 0, 6, 2), Shape(129, 300, 6, 2, 128, 2)])
@pytest.mark.parametrize("window", [None, 40])
def test_dense_against_float64(shape: Shape, window: int | None) -> None:
    query, kv = random_problem(shape)
    exact, _ = exact_attention(query, kv, causal_mask(shape, window), 0.1)
    output = dense_attention(query.cuda(), to_gpu(kv), scale=0.1, window=window)
    torch.testing.assert_close(output.cpu().double(), exact, atol=2e-2, rtol=1e-2)


def test_a_dense_chunk_builds_no_scores_in_memory() -> None:
    query, kv = random_problem(Shape(8192, 8192, heads=8, kv_heads=2))
    query, kv = query.cuda(), to_gpu(kv)
    dense_attention(query, kv, scale=0.1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dense_attention(query, kv, scale=0.1)
    assert torch.cuda.max_memory_allocated() - before < 100e6
