"""Rows for the table of `sale_attention.crossover`: what the phases cost on this machine, by backend and head_dim.

    python -m benchmarks.attention_costs [--rounds 20]

Run it on an idle machine. Each figure is the least of the rounds, of 512 rows at the end of 2048 random keys.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from sale_attention import AttentionBackend, BlockGrid, KvView, LayerPolicy, SaleConfig, Selection, get_backend
from sale_attention.config import HeadPlan
from sale_attention.cpu import CpuBackend, available_isas
from sale_attention.quantise import default_key_centre, quantise_key

TOKENS = 2048
ROWS = 512
#: Query heads and KV heads by head_dim: the default model's, and those of the shared traces' model.
SHAPES = {64: (9, 3), 128: (12, 2)}
EVERY_SECOND_BLOCK = 0x55555555


def measure(backend: AttentionBackend, head_dim: int, rounds: int) -> tuple[float, float, float, float]:
    """Nanoseconds by dense pair, estimated pair, computed pair and row."""
    heads, kv_heads = SHAPES[head_dim]
    config, scale = SaleConfig(), head_dim**-0.5
    query = torch.randn(1, heads, ROWS, head_dim).bfloat16()
    kv = KvView(*(torch.randn(1, kv_heads, TOKENS, head_dim).bfloat16() for _ in range(2)))
    grid = BlockGrid.of(ROWS, TOKENS, config)
    plan = HeadPlan.resolve(LayerPolicy.uniform(heads), config, TOKENS)
    centre = default_key_centre(kv, config)
    key_codes, query_codes = quantise_key(kv, centre, config), backend.quantise_query(query, grid, config)
    # Nothing passes an infinite threshold, so no block lets its estimation end early.
    thresholds = torch.full(query.shape[:3], float("inf"))
    words = torch.full((1, heads, grid.query_blocks, grid.mask_words), EVERY_SECOND_BLOCK, dtype=torch.int32)
    kept = Selection(words, grid.key_blocks)
    output, lse = torch.empty_like(query), torch.empty(query.shape[:3])

    def estimate_row() -> None:
        backend.quantise_query(query, grid, config)
        backend.sink_local_lse(query, kv, centre, grid, scale)

    block_pairs = grid.query_block * grid.key_block
    pairs = heads * grid.causal_blocks() * block_pairs
    computed = heads * attended_blocks(grid) * block_pairs
    return (
        least(lambda: backend.attend_all(query, kv, grid, scale, output, None), rounds) / pairs,
        least(lambda: backend.select(query_codes, key_codes, thresholds, plan, grid, kv), rounds) / pairs,
        least(lambda: backend.compute(query, kv, kept, plan, grid, scale, output, lse), rounds) / computed,
        least(estimate_row, rounds) / (heads * ROWS),
    )


def attended_blocks(grid: BlockGrid) -> int:
    """Key blocks that `compute` visits for one head, every second selectable one kept."""
    total = grid.always_attended_blocks()
    for index in range(grid.query_blocks):
        total += sum(1 for block in range(*grid.selectable(index)) if block % 2 == 0)
    return total


def least(work: Callable[[], object], rounds: int) -> float:
    """Least nanoseconds of some rounds, after one to warm up."""
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter_ns()
        work()
        best = min(best, time.perf_counter_ns() - started)
    return best


def main() -> None:
    """Prints the table's rows for every instruction set of this CPU and the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="runs of each phase (default: %(default)s)")
    rounds = parser.parse_args().rounds
    for backend in (*(CpuBackend(isa) for isa in available_isas()), get_backend("reference")):
        rows = {dim: tuple(float(f"{figure:.4g}") for figure in measure(backend, dim, rounds)) for dim in SHAPES}
        print(f'    "{backend.description}": {rows},', flush=True)


if __name__ == "__main__":
    main()
