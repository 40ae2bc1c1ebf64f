"""The attention benchmark's rows as text: by trace, and medians over the traces."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: A row as JSON holds it: `dataclasses.asdict(attention_measure.Row)`.
JsonRow = Mapping[str, Any]

ESTIMATION_PHASES = ("quantise", "sink_local", "select")


def summarise(rows: Sequence[JsonRow]) -> list[dict[str, Any]]:
    """Medians over the traces by length, backend and stride; speed-up also with the slowest and fastest trace."""
    groups: dict[tuple[int, str, int], list[JsonRow]] = {}
    for row in rows:
        setting = row["setting"]
        groups.setdefault((row["tokens"], setting["backend"], setting["stride"]), []).append(row)
    return [_summary(tokens, backend, stride, members) for (tokens, backend, stride), members in sorted(groups.items())]


def _summary(tokens: int, backend: str, stride: int, rows: Sequence[JsonRow]) -> dict[str, Any]:
    def median(value: Callable[[JsonRow], float]) -> float:
        return statistics.median(value(row) for row in rows)

    speedups = [row["speedup"]["median"] for row in rows]
    return {
        "tokens": tokens,
        "backend": backend,
        "stride": stride,
        "traces": len(rows),
        "dense_seconds": median(lambda row: row["dense_seconds"]["median"]),
        "seconds": median(lambda row: row["seconds"]["median"]),
        "speedup": statistics.median(speedups),
        "speedup_range": [min(speedups), max(speedups)],
        "density": median(lambda row: row["density"]),
        "l1_error": median(lambda row: row["l1_error"]),
        "phase_seconds": _by_name(rows, "phase_seconds"),
        "dense_shares": _by_name(rows, "dense_shares"),
        "dense_gflops": median(lambda row: row["dense_gflops"]),
        "execution_gflops": median(lambda row: row["execution_gflops"] or 0.0) or None,
        "floor": _by_name(rows, "floor"),
    }


def _by_name(rows: Sequence[JsonRow], field: str) -> dict[str, float]:
    return {name: statistics.median(row[field][name] for row in rows) for name in rows[0][field]}


def trace_table(rows: Sequence[JsonRow]) -> str:
    """One line a trace, length, backend and stride; ranges are quartiles over the rounds."""
    head = ["trace", "tokens", "backend", "stride", "short rows", "rounds", "dense ms", "sale ms", "speed-up"]
    head += ["density", "L1 error"]
    lines = [
        [
            row["trace"],
            str(row["tokens"]),
            row["setting"]["backend"],
            str(row["setting"]["stride"]),
            str(row["short_rows"]),
            str(row["rounds"]),
            _milliseconds(row["dense_seconds"]),
            _milliseconds(row["seconds"]),
            f"{row['speedup']['median']:.2f} ({row['speedup']['low']:.2f}-{row['speedup']['high']:.2f})",
            f"{row['density']:.3f}",
            f"{row['l1_error']:.4f}",
        ]
        for row in rows
    ]
    return columns(head, lines)


def summary_table(summaries: Sequence[JsonRow], ceilings: Mapping[str, float]) -> str:
    """Medians over the traces, each figure beside its floor."""
    head = ["tokens", "backend", "stride", "dense ms", "floor", "sale ms", "floor", "speed-up", "traces"]
    head += ["quantise", "sink-local", "select", "floor", "execution", "dense"]
    lines = [
        [
            str(row["tokens"]),
            row["backend"],
            str(row["stride"]),
            f"{1e3 * row['dense_seconds']:.1f}",
            f"{1e3 * row['floor']['dense']:.1f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['floor']['total']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_range'][0]:.2f}-{row['speedup_range'][1]:.2f}",
            *(f"{row['dense_shares'][name]:.1%}" for name in ESTIMATION_PHASES),
            f"{row['floor']['estimation'] / row['dense_seconds']:.1%}",
            f"{row['execution_gflops']:.0f}" if row["execution_gflops"] else "-",
            f"{row['dense_gflops']:.0f}",
        ]
        for row in summaries
    ]
    return f"{columns(head, lines)}\n{_notes(ceilings)}"


def _notes(ceilings: Mapping[str, float]) -> str:
    workers = ceilings["workers"]
    return (
        "sale: whole attention. quantise, sink-local, select: shares of dense time. execution, dense: GFLOP/s\n"
        "a worker (CPU thread or GPU): blocks of sparse rows over the compute phase, causal pairs over dense time.\n"
        "Floors are work over the ceilings measured in this run, a worker: "
        f"bf16 {ceilings['bf16_flops'] / workers / 1e9:.0f} GFLOP/s, "
        f"int8 {ceilings['int8_ops'] / workers / 1e9:.0f} GOP/s;\n"
        f"in all: {workers} workers, copy {ceilings['copy_bytes'] / 1e9:.1f} GB/s."
    )


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Text in columns, right-aligned but for the first."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def _milliseconds(spread: Mapping[str, float]) -> str:
    return f"{1e3 * spread['median']:.1f} ({1e3 * spread['low']:.1f}-{1e3 * spread['high']:.1f})"
