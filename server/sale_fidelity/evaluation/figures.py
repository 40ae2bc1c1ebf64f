"""Pictures of an evaluation, drawn from its JSON, so that a committed result gives the committed picture.

python -m sale_fidelity.evaluation.figures RESULT.json ... --output FOLDER [--prefix fidelity-]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WITHOUT_MATPLOTLIB = "no pictures: matplotlib is not installed (pip install 'sale-prefill[bench]')"
_MASK_COLOURS = ("white", "#e8e8e8", "#c44e52", "#4c72b0")
_MASK_NAMES = ("not seen", "skipped", "selected", "always attended")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw(report: Mapping[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Every picture that the report has the figures for; returns the files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sale-prefill"  # the same figures make the same file
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, part, paint in _PICTURES:
        if part in report and (figure := paint(report)) is not None:
            written.append(folder / f"{prefix}{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None})
    return written


def _needle(report: Mapping[str, Any]) -> Any:
    """Share of needles found and mean margin, dense and SALE, over depth and length."""
    from matplotlib.figure import Figure

    items = [item for item in report["retrieval"]["items"] if item["task"] == "needle"]
    if not items:
        return None
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(2, 2)
    margins = [item[f"{way}_margin"] for item in items for way in ("dense", "sale")]
    for row, way in enumerate(("dense", "sale")):
        for column, (title, of) in enumerate((("found", lambda m: float(m > 0)), ("margin, nats", float))):
            cells, lengths, depths = _by_place(items, f"{way}_margin", of)
            limits = (0.0, 1.0) if column == 0 else (min(0.0, min(margins)), max(margins))
            axes = grid[row][column]
            image = axes.imshow(cells, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set(title=f"{'SALE' if way == 'sale' else 'dense'}: {title}", xlabel="tokens", ylabel="depth")
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
            figure.colorbar(image, ax=axes)
    figure.suptitle(f"One number in a haystack, {report['model']}, {report['setting']}")
    return figure


def _tasks(report: Mapping[str, Any]) -> Any:
    """Accuracy by task, dense and SALE."""
    from matplotlib.figure import Figure

    by_task = report["retrieval"]["summary"]["by_task"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for offset, way in ((-0.2, "dense"), (0.2, "sale")):
        heights = [100 * row[f"{way}_accuracy"] for row in by_task.values()]
        axes.bar(
            [place + offset for place in range(len(by_task))], heights, 0.4, label="SALE" if way == "sale" else way
        )
    axes.set_xticks(range(len(by_task)), by_task)
    axes.set(ylabel="solved, %", ylim=(0, 100), title=f"Retrieval, {report['model']}, {report['setting']}")
    axes.legend(loc="lower right")
    return figure


def _positions(report: Mapping[str, Any]) -> Any:
    """Perplexity and disagreement by position."""
    from matplotlib.figure import Figure

    pieces = report["agreement"]["by_position"]
    places = [(piece["start"] + piece["end"]) / 2 for piece in pieces]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(places, [piece["dense_perplexity"] for piece in pieces], "o-", color="black", label="dense")
    left.plot(places, [piece["perplexity"] for piece in pieces], "x--", color="#c44e52", label="SALE")
    left.set(xlabel="position", ylabel="perplexity")
    left.legend()
    right.plot(places, [100 * piece["agreement"] for piece in pieces], "o-", color="#c44e52")
    right.set(xlabel="position", ylabel="same next token as dense, %")
    figure.suptitle(f"Predictions, {report['model']}, {report['setting']}")
    return figure


def _pareto(report: Mapping[str, Any]) -> Any:
    """Error of attention outputs against cost, a dot a setting."""
    from matplotlib.figure import Figure

    rows = report["attention"]["settings"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (error, title) in zip(
        figure.subplots(1, 2), (("mean_error", "mean row error"), ("p99_error", "p99 row error")), strict=True
    ):
        for kind, style in (("profile", "o--"), ("uniform", "x")):
            chosen = sorted(
                (row["estimated_cost"], row[error], row["name"]) for row in rows if row["name"].startswith(kind)
            )
            axes.plot([x for x, _, _ in chosen], [y for _, y, _ in chosen], style, label=kind)
            for x, y, name in chosen:
                axes.annotate(name.split(", ", 1)[-1] if kind == "profile" else name.removeprefix("uniform "), (x, y))
        axes.set(xlabel="attention's cost, share of dense", ylabel=title)
        axes.legend()
    figure.suptitle(f"Error against cost, {report['model']}, {report['attention']['document']}")
    return figure


def _sparsity(report: Mapping[str, Any]) -> Any:
    """Sparsity and p99 error by layer and head."""
    from matplotlib.figure import Figure

    part = report["attention"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    sparsity = [[1 - density for density in row] for row in part["density_by_head"]]
    panels = (
        (sparsity, "sparsity (1 - density)", (0.0, 1.0)),
        (part["p99_error_by_head"], "p99 row error", (0.0, None)),
    )
    for axes, (cells, title, (low, high)) in zip(figure.subplots(1, 2), panels, strict=True):
        image = axes.imshow(cells, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set(title=title, xlabel="query head", ylabel="layer")
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{report['model']}, {report['setting']}, {part['document']}, {part['tokens']} tokens")
    return figure


def _mask(report: Mapping[str, Any]) -> Any:
    """One head's blocks."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    mask = report["attention"]["mask"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    cells = [[int(cell) for cell in row] for row in mask["rows"]]
    axes.imshow(cells, cmap=ListedColormap(_MASK_COLOURS), vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    axes.set(
        title=f"layer {mask['layer']}, head {mask['head']}: density {mask['density']:.3f}",
        xlabel=f"key block ({mask['key_block']} tokens)",
        ylabel=f"query block ({mask['query_block']} tokens)",
    )
    axes.legend(
        handles=[
            Patch(color=colour, label=name) for colour, name in zip(_MASK_COLOURS[1:], _MASK_NAMES[1:], strict=True)
        ],
        loc="upper right",
    )
    return figure


def _by_place(
    items: Sequence[Mapping[str, Any]], field: str, of: Any
) -> tuple[list[list[float]], list[int], list[float]]:
    """Means of `of(item[field])` by depth and length; NaN where there is no item."""
    lengths = sorted({item["tokens"] for item in items})
    depths = sorted({item["depth"] for item in items})
    cells = []
    for depth in depths:
        row = []
        for length in lengths:
            found = [of(item[field]) for item in items if (item["depth"], item["tokens"]) == (depth, length)]
            row.append(sum(found) / len(found) if found else float("nan"))
        cells.append(row)
    return cells, lengths, depths


_PICTURES = (
    ("needle", "retrieval", _needle),
    ("tasks", "retrieval", _tasks),
    ("positions", "agreement", _positions),
    ("pareto", "attention", _pareto),
    ("sparsity", "attention", _sparsity),
    ("mask", "attention", _mask),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws result files. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of sale-prefill evaluate; parts may lie apart")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--prefix", default="", help="of the pictures' names")
    options = parser.parse_args(arguments)
    if not can_draw():
        print(WITHOUT_MATPLOTLIB, file=sys.stderr)  # noqa: T201  a command line
        return 1
    for file in options.results:
        draw(json.loads(file.read_text()), options.output, options.prefix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
