"""How much arithmetic and traffic attention takes, what this machine can do, and so how fast it could be at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sale_attention import BlockGrid, HeadPlan, LayerPolicy, SaleConfig

_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_TRIALS = 5
_ELEMENT_BYTES = 2  # of queries, keys, values and outputs: bfloat16


@dataclass(frozen=True)
class Ceilings:
    """Best rates measured on this machine, all threads together, a second.

    Attributes:
        bf16_flops: of a large bfloat16 matrix product.
        int8_ops: of a large int8 one.
        copy_bytes: read and written by a copy.
        workers: CPU threads, or 1 for a GPU; rates "a core" are divided by it.
    """

    bf16_flops: float
    int8_ops: float
    copy_bytes: float
    workers: int


@dataclass(frozen=True)
class Work:
    """What attention over one prompt has to do, in operations (two a multiply-add) and bytes touched at least once."""

    dense_flops: int
    short_flops: int
    execution_flops: int
    estimation_ops: int
    tensor_bytes: int
    code_bytes: int


@dataclass(frozen=True)
class Floor:
    """Least seconds: work over ceiling, arithmetic or bytes, whichever takes longer.

    `total` is that of a whole sparse attention: estimation, execution and the short rows that are always dense.
    """

    dense: float
    estimation: float
    execution: float
    total: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Best of a few trials of each: a ceiling is what can be reached, not what usually is."""
    size, count = _GEMM_SIZE[device.type], _COPY_BYTES[device.type]
    operands = torch.randn(2, size, size, device=device)
    left, right = operands.to(torch.bfloat16)
    codes_left, codes_right = operands.mul(40).clamp(-127, 127).to(torch.int8)
    source = torch.ones(count // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        bf16_flops=2 * size**3 / _best_seconds(lambda: left @ right.t(), device),
        int8_ops=2 * size**3 / _best_seconds(lambda: torch._int_mm(codes_left, codes_right.t()), device),
        copy_bytes=count / _best_seconds(lambda: target.copy_(source), device),
        workers=workers(device),
    )


def workers(device: torch.device) -> int:
    """CPU threads, or 1 for a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def attention_work(
    *, tokens: int, short_rows: int, heads: int, head_dim: int, stride: int, computed_blocks: int, config: SaleConfig
) -> Work:
    """Work of SALE and of dense attention over `tokens` tokens, heads sharing one KV head.

    Args:
        tokens: length of the prompt, all of it queries.
        short_rows: of these, the first ones, that attend to everything; a multiple of the query block, or all.
        heads: query heads.
        head_dim: size of a query, a key and a value.
        stride: every how many query rows are inspected.
        computed_blocks: all heads' blocks as `AttentionStatistics` counts them, short rows included.
        config: block geometry.
    """
    return Work(
        dense_flops=4 * head_dim * heads * causal_pairs(tokens),
        short_flops=4 * head_dim * heads * causal_pairs(short_rows),
        execution_flops=4 * head_dim * execution_pairs(computed_blocks, short_rows, heads, config),
        estimation_ops=2 * head_dim * heads * estimation_pairs(tokens, short_rows, stride, config),
        tensor_bytes=_ELEMENT_BYTES * head_dim * tokens * 2 * (heads + 1),
        code_bytes=head_dim * (heads * -(-tokens // stride) + tokens),
    )


def causal_pairs(tokens: int) -> int:
    """(row, key) pairs of a causal prompt."""
    return tokens * (tokens + 1) // 2


def execution_pairs(computed_blocks: int, short_rows: int, heads: int, config: SaleConfig) -> int:
    """(row, key) pairs of the blocks that sparse rows attend to.

    Blocks count whole, those on the diagonal too. Short rows are left out: their time is in another phase.
    """
    short_blocks = BlockGrid.of(short_rows, short_rows, config).causal_blocks() * heads if short_rows else 0
    return (computed_blocks - short_blocks) * config.query_block * config.key_block


def estimation_pairs(tokens: int, short_rows: int, stride: int, config: SaleConfig) -> int:
    """(row, key) pairs whose score is estimated, for one head: inspected rows x keys between sink and local window."""
    if tokens == short_rows:
        return 0
    grid = BlockGrid.of(tokens - short_rows, tokens, config)
    plan = HeadPlan.resolve(LayerPolicy.uniform(1, query_stride=stride), config, tokens)
    pairs = 0
    for index in range(grid.query_blocks):
        first_row, end_row = grid.rows(index)
        first_block, end_block = grid.selectable(index)
        step = 1 if grid.block_start(index) >= plan.unstrided_from else stride
        pairs += -(-(end_row - first_row) // step) * (end_block - first_block) * config.key_block
    return pairs


def floor_of(work: Work, ceilings: Ceilings) -> Floor:
    """Least seconds for `work` under `ceilings`."""

    def seconds(operations: int, rate: float, num_bytes: int) -> float:
        return max(operations / rate, num_bytes / ceilings.copy_bytes) if operations else 0.0

    dense = seconds(work.dense_flops, ceilings.bf16_flops, work.tensor_bytes)
    estimation = seconds(work.estimation_ops, ceilings.int8_ops, work.code_bytes)
    execution = seconds(work.execution_flops, ceilings.bf16_flops, work.tensor_bytes)
    short = work.short_flops / ceilings.bf16_flops
    return Floor(dense, estimation, execution, estimation + execution + short)


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_TRIALS + 1):  # the first one, which loads kernels, will hardly be the best
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best
