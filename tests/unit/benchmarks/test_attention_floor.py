"""Counts of work are those that counting pair by pair gives, and floors follow from them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention_floor import (
    Ceilings,
    Work,
    attention_work,
    causal_pairs,
    estimation_pairs,
    execution_pairs,
    floor_of,
    measure_ceilings,
)
from sale_attention import AttentionStatistics, BlockGrid, KvView, LayerPolicy, SaleConfig, attend

CONFIG = SaleConfig(local_tokens=64, dense_rows=256, centre_tokens=256)


def estimated_pair_by_pair(tokens: int, stride: int) -> int:
    """Rows at multiples of the stride (all in the last 128) x keys between the sink and the block's local window."""
    tail = (tokens - CONFIG.unstrided_tail_tokens) // CONFIG.query_block * CONFIG.query_block
    pairs = 0
    for row in range(CONFIG.dense_rows, tokens):
        if row % stride == 0 or row >= tail:
            block_start = row // CONFIG.query_block * CONFIG.query_block
            window = (block_start - CONFIG.local_tokens) // CONFIG.key_block * CONFIG.key_block
            pairs += max(0, window - CONFIG.sink_tokens)
    return pairs


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("tokens", [256, 257, 640, 1000])
def test_estimated_pairs(tokens: int, stride: int) -> None:
    assert estimation_pairs(tokens, CONFIG.dense_rows, stride, CONFIG) == estimated_pair_by_pair(tokens, stride)


def test_causal_pairs() -> None:
    assert causal_pairs(5) == 1 + 2 + 3 + 4 + 5


@pytest.mark.parametrize(("tau", "share"), [(1e-30, "all"), (float("inf"), "always attended")])
def test_execution_pairs_are_those_of_sparse_rows(tau: float, share: str) -> None:
    tokens, heads = 768, 2
    query, keys, values = (torch.randn(1, count, tokens, 16) for count in (heads, 1, 1))
    counts = AttentionStatistics()
    policy = LayerPolicy.uniform(heads, tau=tau)
    attend(query, KvView(keys, values), policy=policy, config=CONFIG, statistics=counts)
    grid = BlockGrid.of(tokens - CONFIG.dense_rows, tokens, CONFIG)
    blocks = heads * (grid.causal_blocks() if share == "all" else grid.always_attended_blocks())
    computed = int(counts.computed_blocks[0].sum())
    assert execution_pairs(computed, CONFIG.dense_rows, heads, CONFIG) == blocks * CONFIG.query_block * CONFIG.key_block


def test_a_short_prompt_is_nothing_but_short_rows() -> None:
    blocks = 3 * BlockGrid.of(200, 200, CONFIG).causal_blocks()
    work = attention_work(
        tokens=200, short_rows=200, heads=3, head_dim=64, stride=1, computed_blocks=blocks, config=CONFIG
    )
    assert work.short_flops == work.dense_flops == 4 * 64 * 3 * causal_pairs(200)
    assert work.execution_flops == work.estimation_ops == 0


def test_floors_are_arithmetic_or_bytes_whichever_takes_longer() -> None:
    work = Work(
        dense_flops=1000, short_flops=100, execution_flops=200, estimation_ops=400, tensor_bytes=5, code_bytes=50
    )
    quick_memory = Ceilings(bf16_flops=100, int8_ops=200, copy_bytes=1e9, workers=2)
    floor = floor_of(work, quick_memory)
    assert (floor.dense, floor.estimation, floor.execution, floor.total) == (10, 2, 2, 5)
    slow_memory = Ceilings(bf16_flops=100, int8_ops=200, copy_bytes=1, workers=2)
    assert floor_of(work, slow_memory).estimation == 50


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.attention_floor._GEMM_SIZE", {"cpu": 64})
    monkeypatch.setattr("benchmarks.attention_floor._COPY_BYTES", {"cpu": 1 << 16})
    ceilings = measure_ceilings(torch.device("cpu"))
    assert min(ceilings.bf16_flops, ceilings.int8_ops, ceilings.copy_bytes) > 1e6
    assert ceilings.workers == torch.get_num_threads()
