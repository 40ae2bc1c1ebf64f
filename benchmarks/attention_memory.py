"""Peak memory of `sale_attention.attend` alone, one head, at growing lengths: it must grow linearly.

    python benchmarks/attention_memory.py [--lengths 16384 32768 65536] [--head-dims 64 128] [--json]

Each measurement runs in a fresh process: inputs are made and a short call warms the libraries up, the kernel's
high-water mark of the resident set is reset, `attend` runs once at default settings, and the growth of the mark over
the resident set before the call is reported. malloc is told to hand freed tensors back at once (a fixed mmap
threshold), so that the figure is what the call holds, not what the allocator keeps; that costs time. Inputs are random
normal numbers, of which the default threshold keeps almost every block: the worst case for memory and time (a larger
`--tau` shows the others). Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
LENGTHS = (16384, 32768, 65536)
HEAD_DIMS = (64, 128)
WARM_UP_TOKENS = 2048


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB (VmRSS, VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def measure(tokens: int, head_dim: int, tau: float) -> dict[str, Any]:
    """Run `attend` once in this process on `tokens` tokens of one head and report what it took."""
    import torch

    from sale_attention import AttentionStatistics, KvView, LayerPolicy, attend

    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, 1, tokens, head_dim, generator=generator).to(torch.bfloat16) for _ in range(3)
    )
    policy = LayerPolicy.uniform(1, tau=tau)
    short = slice(0, WARM_UP_TOKENS)
    attend(query[:, :, short], KvView(keys[:, :, short], values[:, :, short]), policy=policy)
    statistics = AttentionStatistics()
    # Freed memory that malloc still holds would hide what the call takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start_seconds = time.perf_counter()
    attend(query, KvView(keys, values), policy=policy, statistics=statistics)
    return {
        "tokens": tokens,
        "head_dim": head_dim,
        "seconds": time.perf_counter() - start_seconds,
        "density": statistics.density,
        "input_bytes": 3 * query.nbytes,
        "peak_growth_bytes": status_bytes("VmHWM") - before,
    }


def measure_in_fresh_process(tokens: int, head_dim: int, tau: float) -> dict[str, Any]:
    """`measure` in a new interpreter, so that no earlier measurement's memory is reused."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(tokens), str(head_dim), str(tau)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        raise SystemExit(f"measuring {tokens} tokens failed:\n{finished.stderr}")
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def growth_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By head_dim, growth of the longest over the shortest length, beside the ratio of the lengths."""
    ratios = []
    for head_dim in sorted({result["head_dim"] for result in results}):
        rows = sorted((r for r in results if r["head_dim"] == head_dim), key=lambda r: r["tokens"])
        ratios.append(
            {
                "head_dim": head_dim,
                "length_ratio": rows[-1]["tokens"] / rows[0]["tokens"],
                "growth_ratio": rows[-1]["peak_growth_bytes"] / rows[0]["peak_growth_bytes"],
            }
        )
    return ratios


def print_table(results: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """Human-readable figures."""
    print(f"{'tokens':>8} {'head_dim':>8} {'inputs MiB':>11} {'peak growth MiB':>16} {'density':>8} {'seconds':>8}")
    for row in results:
        print(
            f"{row['tokens']:>8} {row['head_dim']:>8} {row['input_bytes'] / MIB:>11.1f} "
            f"{row['peak_growth_bytes'] / MIB:>16.1f} {row['density']:>8.3f} {row['seconds']:>8.1f}"
        )
    for ratio in ratios:
        print(
            f"head_dim {ratio['head_dim']}: {ratio['length_ratio']:.1f}x the tokens take "
            f"{ratio['growth_ratio']:.2f}x the memory"
        )


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens (default: %(default)s)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, help="default: %(default)s")
    parser.add_argument("--tau", type=float, default=0.004, help="threshold (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--child", nargs=3, metavar=("TOKENS", "HEAD_DIM", "TAU"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, then print."""
    arguments = parse_arguments()
    if arguments.child:
        tokens, head_dim, tau = arguments.child
        print(json.dumps(measure(int(tokens), int(head_dim), float(tau))))
        return
    results = [
        measure_in_fresh_process(tokens, head_dim, arguments.tau)
        for head_dim in arguments.head_dims
        for tokens in arguments.lengths
    ]
    ratios = growth_ratios(results)
    if arguments.json:
        print(json.dumps({"results": results, "ratios": ratios, "tau": arguments.tau}))
    else:
        print_table(results, ratios)


if __name__ == "__main__":
    main()
