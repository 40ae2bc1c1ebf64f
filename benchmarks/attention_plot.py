"""The attention benchmark's plot: time against length, and where SALE's time goes as a share of dense."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.attention_table import ESTIMATION_PHASES, JsonRow

WITHOUT_MATPLOTLIB = "no plot: matplotlib is not installed (pip install matplotlib), or say --no-plot"
#: Bottom to top.
_PHASES = (*ESTIMATION_PHASES, "compute", "dense")
_NAMES = {"sink_local": "sink-local", "compute": "execution", "dense": "short rows (dense)"}
_COLOURS = ("#c6dbef", "#6baed6", "#2171b5", "#fdae6b", "#d9d9d9")


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def plot(summaries: Sequence[JsonRow], title: str, file: Path) -> None:
    """Draws `attention_table.summarise`'s rows to `file`, whose suffix names the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sale-prefill"  # the same figures make the same file
    from matplotlib import pyplot

    figure, (times, shares) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    _draw_times(times, summaries)
    _draw_shares(shares, summaries)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def series(summaries: Sequence[JsonRow]) -> dict[str, list[JsonRow]]:
    """Rows of each backend and stride, by label, lengths ascending."""
    found: dict[str, list[JsonRow]] = {}
    for row in sorted(summaries, key=lambda row: row["tokens"]):
        found.setdefault(f"{row['backend']}, stride {row['stride']}", []).append(row)
    return found


def _draw_times(axes: Any, summaries: Sequence[JsonRow]) -> None:
    dense = {row["tokens"]: row["dense_seconds"] for row in summaries}
    lengths = sorted(dense)
    axes.plot(lengths, [1e3 * dense[length] for length in lengths], "o-", color="black", label="dense (torch SDPA)")
    for label, rows in series(summaries).items():
        tokens = [row["tokens"] for row in rows]
        (line,) = axes.plot(tokens, [1e3 * row["seconds"] for row in rows], "o-", label=f"SALE {label}")
        floors = [1e3 * row["floor"]["total"] for row in rows]
        axes.plot(tokens, floors, ":", color=line.get_color(), label=f"floor of {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [_length(length) for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="prompt, tokens", ylabel="attention of one KV head's query group, ms")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_shares(axes: Any, summaries: Sequence[JsonRow]) -> None:
    """Stacked bars, one a length and setting: phases as shares of the dense time at that length."""
    by_label = series(summaries)
    lengths = sorted({row["tokens"] for row in summaries})
    width, highest = 0.8 / len(by_label), 100.0
    for place, (label, rows) in enumerate(by_label.items()):
        centres = [lengths.index(row["tokens"]) + (place - (len(by_label) - 1) / 2) * width for row in rows]
        bottoms = [0.0] * len(rows)
        for phase, colour in zip(_PHASES, _COLOURS, strict=True):
            heights = [100 * row["dense_shares"][phase] for row in rows]
            name = _NAMES.get(phase, phase) if place == 0 else None
            axes.bar(centres, heights, 0.92 * width, bottom=bottoms, color=colour, label=name)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        highest = max(highest, *bottoms)
        for row, centre, top in zip(rows, centres, bottoms, strict=True):
            estimation = sum(row["dense_shares"][phase] for phase in ESTIMATION_PHASES)
            axes.annotate(
                f"{label}: {estimation:.0%}",
                (centre, top),
                xytext=(0, 2),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=7,
            )
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
    axes.set_ylim(0, 1.5 * highest)  # room for the labels
    axes.set(xlabel="prompt, tokens", ylabel="share of dense time, %", title="estimation in blue, its share in figures")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(_PHASES), fontsize=8)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
