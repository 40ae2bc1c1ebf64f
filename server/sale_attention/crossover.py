"""Where sparse attention starts to pay: a cost model fed by a short self-benchmark, cached per machine.

A row at position p costs, dense, `p * dense_pair`; sparse, `row + p * estimate_pair / stride + kept(p) * compute_pair`.
The costs are measured on this machine; the kept share before anybody calibrated this model is the table below. Rows
before the crossover take dense attention: a choice by absolute position, fixed for a session's life, so that neither
chunks nor appends can change a result.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .backends import AttentionBackend
from .config import HeadPlan, LayerPolicy, SaleConfig
from .geometry import BlockGrid
from .jit import kernel_cache_dir
from .kv_view import KvView
from .quantise import default_key_centre, quantise_key
from .select import Selection

# Kept share, sink and local included, of a query block at position p: 0.515 * (p / 2048) ** -0.6 at tau 0.004 and
# stride 1. Measured 2026-11-24 on four layers of Qwen2.5-Coder-1.5B (32K of source, 12 heads) and on all heads of
# SmolLM2-135M (three documents of 7,680 tokens): 0.76 at 1K, 0.51 at 2K, 0.34 at 4K, 0.32 at 8K, 0.13 at 16K, 0.09 at
# 30K. Half or double tau: 1.22 or 0.80 of that. Strides 2 and 4 keep less at the same tau.
_KEPT_AT_2K = 0.515
_KEPT_DECAY = 0.6
_KEPT_TAU_EXPONENT = 0.32
_KEPT_BY_STRIDE = {1: 1.0, 2: 0.88, 4: 0.77}

_POSITION_STEP = 128
_LONGEST_POSITION = 1 << 20
_BENCHMARK_TOKENS = 2048
_BENCHMARK_ROWS = 512
_BENCHMARK_REPEATS = 3


@dataclass(frozen=True)
class AttentionCosts:
    """Seconds on this machine: by pair of one row and one key, and by row, of one query head."""

    dense_pair_seconds: float
    estimate_pair_seconds: float
    compute_pair_seconds: float
    row_seconds: float

    def sparse_row_seconds(self, position: int, tau: float, query_stride: int) -> float:
        """What a row at `position` is expected to cost if it is sparse."""
        kept = expected_density(position, tau, query_stride)
        pairs = self.estimate_pair_seconds / query_stride + kept * self.compute_pair_seconds
        return self.row_seconds + position * pairs


def expected_density(position: int, tau: float, query_stride: int) -> float:
    """Kept share of a query block at `position`, where no profile says better."""
    share: float = _KEPT_AT_2K * (max(position, 1) / 2048) ** -_KEPT_DECAY * (tau / 0.004) ** -_KEPT_TAU_EXPONENT
    return min(1.0, share * _KEPT_BY_STRIDE[query_stride])


def crossover_position(costs: AttentionCosts, tau: float, query_stride: int, config: SaleConfig) -> int:
    """First row position, a multiple of 128, from which sparse rows are expected to be cheaper than dense ones.

    At least `config.dense_rows`, before which the key centre is not known; past a million tokens where sparse rows
    never pay.
    """
    position = -(-config.dense_rows // _POSITION_STEP) * _POSITION_STEP
    while position < _LONGEST_POSITION:
        if costs.sparse_row_seconds(position, tau, query_stride) < position * costs.dense_pair_seconds:
            return position
        position += max(_POSITION_STEP, position // 8 // _POSITION_STEP * _POSITION_STEP)
    return _LONGEST_POSITION


def measured_costs(
    backend: AttentionBackend,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    config: SaleConfig,
) -> AttentionCosts:
    """Costs of `backend` for attention of this shape: read from the machine's cache, else measured and kept there.

    Measuring takes well under a second with native kernels. A cache that cannot be written costs the next start that
    time again, and nothing else.
    """
    what = [backend.description, _machine(device), torch.get_num_threads(), heads, kv_heads, head_dim, str(dtype)]
    key = hashlib.sha256(json.dumps([*what, asdict(config)]).encode()).hexdigest()[:20]
    file = kernel_cache_dir().parent / "costs" / f"{key}.json"
    try:
        return AttentionCosts(**json.loads(file.read_text())["costs"])
    except (OSError, ValueError, KeyError, TypeError):
        costs = _measure(backend, heads, kv_heads, head_dim, dtype, device, config)
        _write(file, {"what": what, "costs": asdict(costs)})
        return costs


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _write(file: Path, content: dict[str, object]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as handle:
            json.dump(content, handle, indent=1)
        Path(handle.name).replace(file)
    except OSError:
        return


def _measure(
    backend: AttentionBackend,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    config: SaleConfig,
) -> AttentionCosts:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = normal(1, heads, _BENCHMARK_ROWS, head_dim)
    kv = KvView(normal(1, kv_heads, _BENCHMARK_TOKENS, head_dim), normal(1, kv_heads, _BENCHMARK_TOKENS, head_dim))
    grid = BlockGrid.of(_BENCHMARK_ROWS, _BENCHMARK_TOKENS, config)
    plan = HeadPlan.resolve(LayerPolicy.uniform(heads), config, _BENCHMARK_TOKENS)
    scale = head_dim**-0.5
    centre = default_key_centre(kv, config)
    key_codes = quantise_key(kv, centre, config)
    query_codes = backend.quantise_query(query, grid, config)
    # Nothing passes an infinite threshold, so no block lets its estimation end early.
    thresholds = torch.full(query.shape[:3], float("inf"), device=device)
    kept = Selection(
        torch.full((1, heads, grid.query_blocks, grid.mask_words), 0x55555555, dtype=torch.int32, device=device),
        grid.key_blocks,
    )
    output, lse = torch.empty_like(query), torch.empty(query.shape[:3], device=device)

    def rows() -> None:
        backend.quantise_query(query, grid, config)
        backend.sink_local_lse(query, kv, centre, grid, scale)

    pairs = heads * grid.causal_blocks() * grid.query_block * grid.key_block
    kept_blocks = _attended_blocks(kept, grid)
    return AttentionCosts(
        dense_pair_seconds=_best(lambda: backend.attend_all(query, kv, grid, scale, output, None), device) / pairs,
        estimate_pair_seconds=_best(lambda: backend.select(query_codes, key_codes, thresholds, plan, grid, kv), device)
        / pairs,
        compute_pair_seconds=_best(lambda: backend.compute(query, kv, kept, plan, grid, scale, output, lse), device)
        / (kept_blocks * grid.query_block * grid.key_block),
        row_seconds=_best(rows, device) / (heads * _BENCHMARK_ROWS),
    )


def _attended_blocks(kept: Selection, grid: BlockGrid) -> int:
    """Blocks that `compute` visits for every head, where the selection has bits outside the selectable range too."""
    total = 0
    for index in range(grid.query_blocks):
        start, end = grid.selectable(index)
        sink_end, local_start, local_end = grid.always_attended(index)
        chosen = sum(1 for block in range(start, end) if not block % 2)
        total += kept.words.shape[1] * (sink_end + local_end - local_start + chosen)
    return total


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a few runs after one to warm up."""
    best = float("inf")
    work()
    for _ in range(_BENCHMARK_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
