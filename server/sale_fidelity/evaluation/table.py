"""An evaluation as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def table(report: Mapping[str, Any]) -> str:
    """Every figure of `evaluate.evaluate`'s report that fits a line."""
    lines = [f"{report['model']}, {report['dtype']} on {report['device']}: dense against {report['setting']}"]
    for part, show in (("agreement", _agreement), ("retrieval", _retrieval), ("attention", _attention)):
        if part in report:
            lines += ["", *show(report[part])]
    return "\n".join(lines)


def _agreement(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'next-token predictions':<44} {'agree':>8} {'KL, nats':>9} {'perplexity':>10} {'change':>8} {'density':>8}"
    rows = [(document["name"], document) for document in part["documents"]]
    rows += [(f"positions {piece['start']} to {piece['end']}", piece) for piece in part["by_position"]]
    for name, row in [*rows, ("all", part["pooled"])]:
        yield (
            f"{name:<44} {100 * row['agreement']:>6.2f} % {row['mean_kl_nats']:>9.5f} {row['perplexity']:>10.3f} "
            f"{100 * row['perplexity_change']:>+6.2f} % {row['density']:>8.3f}"
        )


def _retrieval(part: Mapping[str, Any]) -> Iterator[str]:
    summary = part["summary"]
    yield f"{'retrieval':<20} {'items':>6} {'dense':>8} {'SALE':>8} {'lost':>5} {'won':>5} {'worse by at most':>17}"
    rows = list(summary["by_task"].items())
    rows += [(f"{tokens} tokens", row) for tokens, row in sorted(summary["by_tokens"].items(), key=lambda p: int(p[0]))]
    for name, row in [*rows, ("all", summary["pooled"])]:
        yield (
            f"{name:<20} {row['items']:>6} {100 * row['dense_accuracy']:>6.1f} % {100 * row['sale_accuracy']:>6.1f} % "
            f"{row['lost']:>5} {row['won']:>5} {100 * row['worst_loss']:>10.2f} points"
        )
    yield f"(at most: one-sided, {100 * summary['confidence']:.0f} % confidence, from paired items)"


def _attention(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'attention outputs, ' + part['document']:<58} {'density':>8} {'cost':>6} {'mean error':>10} {'p99':>8}"
    for row in part["settings"]:
        yield (
            f"{row['name']:<58} {row['density']:>8.3f} {row['estimated_cost']:>6.3f} {row['mean_error']:>10.4f} "
            f"{row['p99_error']:>8.4f}"
        )
    yield f"{'layer':<58} {'density':>8} {'':>6} {'mean error':>10} {'p99, worst head':>8}"
    columns = (part["density_by_head"], part["mean_error_by_head"], part["p99_error_by_head"])
    for layer, (density, mean, p99) in enumerate(zip(*columns, strict=True)):
        heads = len(density)
        yield f"{layer:<58} {sum(density) / heads:>8.3f} {'':>6} {sum(mean) / heads:>10.4f} {max(p99):>8.4f}"
