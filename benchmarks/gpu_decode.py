"""Decode attention on one GPU: time, and bytes a second against what the memory can do.

    python -m benchmarks.gpu_decode [--heads 32 --kv-heads 8 --head-dim 128] [--peak 3350]
    python -m benchmarks.gpu_decode --model DIRECTORY [--tokens 8192]

Every case is captured as a CUDA graph and replayed, as the engine does; times are medians over replays, by CUDA events.
Counted are keys and values once, nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sale_attention import KvView, SaleConfig, decode_attention
from sale_attention.cuda import decode as native
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.model import load_model
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.kv.pool import KvPool

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_K = 1024
#: Of an H100's memory, nominal.
PEAK_GIGABYTES_A_SECOND = 3350.0


@dataclass(frozen=True)
class Case:
    """Sequences of one call; `page_tokens` 0 is contiguous."""

    name: str
    lengths: tuple[int, ...]
    page_tokens: int = 0


MIXED = (128 * _K, *(32 * _K,) * 3, *(8 * _K - 1,) * 12, *(1000,) * 16)
CASES = (
    Case("16 x 64K", (64 * _K,) * 16),
    Case("16 x 64K, pages of 128", (64 * _K,) * 16, 128),
    Case("16 x 64K, pages of 32", (64 * _K,) * 16, 32),
    Case("1 x 128K", (128 * _K,)),
    Case("1 x 128K, pages of 128", (128 * _K,), 128),
    Case("1 x 64K", (64 * _K,)),
    Case("1 x 16K", (16 * _K,)),
    Case("1 x 4K (from the L2)", (4 * _K,)),
    Case("4 x 32K", (32 * _K,) * 4),
    Case("64 x 4K", (4 * _K,) * 64),
    Case("64 x 4K, pages of 128", (4 * _K,) * 64, 128),
    Case(
        "mixed: 128K, 3 x 32K, 12 x 8K - 1, 16 x 1000", (128 * _K, *(32 * _K,) * 3, *(8 * _K - 1,) * 12, *(1000,) * 16)
    ),
)


def milliseconds(run: Callable[[], object], rounds: int = 7, calls: int = 10) -> float:
    """Median over rounds of one call's time."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_rate(gigabytes: int = 2) -> float:
    """GB/s of a copy, bytes read and bytes written."""
    source = torch.empty(gigabytes << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def read_rate(gigabytes: int = 4) -> float:
    """GB/s of a sum."""
    source = torch.ones(gigabytes << 28, dtype=torch.float32, device="cuda")
    return 4 * source.numel() / milliseconds(source.sum) / 1e6


def problem(case: Case, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, KvView, Tensor]:
    """Random query, keys and values, and the lengths on the device."""
    batch, capacity = len(case.lengths), -(-max(case.lengths) // 256) * 256
    query = torch.randn(batch, heads, 1, head_dim, dtype=dtype, device="cuda")
    lengths = torch.tensor(case.lengths, device="cuda")
    if not case.page_tokens:
        shape = (batch, kv_heads, capacity, head_dim)
        return query, KvView(*(torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))), lengths
    counts = [-(-length // case.page_tokens) for length in case.lengths]
    pages = torch.randperm(sum(counts), device="cuda").split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)
    shape = (sum(counts), kv_heads, case.page_tokens, head_dim)
    keys, values = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
    return query, KvView(keys, values, table, table.shape[1] * case.page_tokens), lengths


def time_case(
    case: Case, heads: int = 32, kv_heads: int = 8, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float]:
    """Milliseconds and GB/s of one case."""
    query, kv, lengths = problem(case, heads, kv_heads, head_dim, dtype)
    assert native.covers(query, kv), "no kernel here; the torch fallback is not worth timing"
    graph = captured(lambda: decode_attention(query, kv, lengths, return_lse=False))
    took = milliseconds(graph.replay)
    return took, sum(case.lengths) * kv_heads * head_dim * 2 * query.element_size() / 1e6 / took


def measure(case: Case, arguments: argparse.Namespace, copy: float) -> None:
    """Prints one case's line."""
    took, rate = time_case(case, arguments.heads, arguments.kv_heads, arguments.head_dim, _DTYPES[arguments.dtype])
    print(f"{case.name:46} {took:8.3f} {rate:8.0f} {rate / arguments.peak:8.1%} {rate / copy:8.1%}", flush=True)


def compare_sdpa(tokens: int, arguments: argparse.Namespace) -> None:
    """Prints torch's time beside ours for one sequence, and how far they differ."""
    shape = (arguments.heads, arguments.kv_heads, arguments.head_dim)
    query, kv, lengths = problem(Case("", (tokens,)), *shape, _DTYPES[arguments.dtype])
    grouped = arguments.heads != arguments.kv_heads
    keys, values = kv.keys[:, :, :tokens], kv.values[:, :, :tokens]

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

    def ours() -> Tensor:
        return decode_attention(query, kv, lengths, return_lse=False).output

    apart = float((sdpa().float() - ours().float()).abs().max())
    theirs, own = (milliseconds(captured(run).replay) for run in (sdpa, ours))
    print(f"1 x {tokens}: torch SDPA {theirs:.3f} ms, ours {own:.3f} ms ({theirs / own:.2f}x); {apart:.2g} apart")


def time_model(directory: Path, tokens: int) -> None:
    """Prints a decoded token's time behind a prompt, launch by launch and by graphs."""
    model = load_model(directory, directory.name, device=torch.device("cuda:0"))
    for graphs in (False, True):
        pool = KvPool(model.kv_shape, 16 << 30)
        settings = AttentionSettings(AttentionMode.DENSE, 0.004, 1)
        engine = Engine(
            model, pool, settings, SaleConfig(), chunk_tokens=4096, attention_backend="auto", decode_graphs=graphs
        )
        sequence = engine.open(settings)
        sequence.kv.reserve(tokens + 64)
        for start in range(0, tokens, 4096):
            chunk = [i % 1000 for i in range(start, min(start + 4096, tokens))]
            engine.prefill_chunk(sequence, chunk, prompt_end=tokens, statistics=engine.new_statistics())
        times = []
        for token in range(50):
            started = time.perf_counter()
            engine.decode_token(sequence, token)
            times.append((time.perf_counter() - started) * 1e3)
        print(
            f"{directory.name}, {tokens} tokens, graphs {graphs}: {statistics.median(times[5:]):.2f} ms a token; "
            f"first {times[0]:.1f}, second {times[1]:.1f} (captures)"
        )
        sequence.release()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--peak", type=float, default=PEAK_GIGABYTES_A_SECOND, help="the memory's nominal GB/s")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--model", type=Path, help="a model directory: time decoded tokens of it instead")
    parser.add_argument("--tokens", type=int, default=8192, help="its prompt")
    parsed = parser.parse_args(arguments)
    if parsed.model is not None:
        time_model(parsed.model, parsed.tokens)
        return
    copy, read = copy_rate(), read_rate()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s, torch.sum {read:.0f} GB/s")
    print(f"{'case':46} {'ms':>8} {'GB/s':>8} {'of peak':>8} {'of copy':>8}")
    for case in CASES:
        if parsed.only in case.name:
            measure(case, parsed, copy)
            torch.cuda.empty_cache()
    for tokens in (4 * _K, 64 * _K, 128 * _K):
        compare_sdpa(tokens, parsed)


if __name__ == "__main__":
    main()
