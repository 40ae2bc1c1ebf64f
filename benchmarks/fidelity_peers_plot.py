"""Error against density and against cost, every method a line: `Point.summary`s drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Mean, p99 and maximum in three rows; in three columns, how the knob was solved.
_ERRORS = {"mean": "mean row error", "p99": "p99 row error", "max": "largest row error"}
_SOLVED = {
    "head": ("density", "density, the same in every head"),
    "shared": ("density", "mean density, one knob a trace"),
    "cost": ("cost", "cost with estimation, share of dense"),
}


def plot(points: Sequence[dict[str, Any]], file: Path, trace: str = "pooled") -> None:
    """Draws the points of one trace, or of all rows pooled, to `file`, whose suffix names the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sale-prefill"  # the same figures make the same file
    from matplotlib import pyplot

    chosen = [point for point in points if point["trace"] == trace]
    colours = mpl.colormaps["tab20"]
    names = list(dict.fromkeys(point["method"] for point in chosen))
    figure, grid = pyplot.subplots(len(_ERRORS), len(_SOLVED), figsize=(13, 11), layout="constrained", sharey="row")
    for axes_row, (error, label) in zip(grid, _ERRORS.items(), strict=True):
        for axes, (solved, (abscissa, title)) in zip(axes_row, _SOLVED.items(), strict=True):
            for place, name in enumerate(names):
                line = sorted(
                    (point[abscissa], point[error])
                    for point in chosen
                    if point["solved"] == solved and point["method"] == name
                )
                ours = name.startswith("SALE")
                axes.plot(
                    [x for x, _ in line],
                    [y for _, y in line],
                    "o-" if ours else "s--",
                    color=colours(place),
                    linewidth=2.0 if ours else 1.2,
                    markersize=4,
                    label=name,
                )
            axes.set_yscale("log")
            axes.set(xlabel=title)
            axes.grid(alpha=0.3, which="both")
        axes_row[0].set(ylabel=label)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"attention outputs against dense, {trace}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
