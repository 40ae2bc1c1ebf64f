"""Predictions of the default model with its profile against dense attention, on ten real documents.

    python -m benchmarks.fidelity_agreement --device cuda --output agreement.json [--documents 10] [--attention]

With `--attention`, what `sale-prefill evaluate` says about attention's outputs comes along; pictures are made of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import Row
from benchmarks.report import provenance
from sale_fidelity import agreement
from sale_fidelity.evaluation.documents import default_documents
from sale_fidelity.evaluation.evaluate import compare_attention, compare_documents, header
from sale_fidelity.evaluation.setting import UNIFORM_BESIDE, find_profile, profile_setting, uniform_setting
from sale_fidelity.models import load_model
from sale_prefill_server.models import DEFAULT_MODEL

TOKENS = 8192
DOCUMENTS = 10
AGREEMENT = 0.98
PERPLEXITY_CHANGE = 0.005
#: Where perplexity's own line starts.
_LONG = 4096


def measure(
    device: str = "auto",
    documents: int = DOCUMENTS,
    profile: str = "auto",
    error_budget: float | None = None,
    attention: bool = False,
) -> dict[str, Any]:
    """Runs the documents; in float32, since in bfloat16 two exact dense kernels differ by as much as SALE does."""
    model = load_model(DEFAULT_MODEL, device=device, dtype="float32")
    found = find_profile(model, profile)
    setting = profile_setting(model, found, error_budget=error_budget)
    started = time.perf_counter()
    texts = default_documents(model, TOKENS, documents)
    report = {
        **header(model, setting),
        "provenance": provenance("python -m benchmarks.fidelity_agreement"),
        "agreement": compare_documents(model, setting, texts, agreement.FIRST_POSITION, _say),
    }
    if attention:
        others = [profile_setting(model, found, error_budget=level.error_budget) for level in found.levels]
        beside = [other for other in others if other.name != setting.name]
        uniform = [uniform_setting(model, tau, stride, setting.config) for tau, stride in UNIFORM_BESIDE]
        report["attention"] = compare_attention(model, [setting, *beside, *uniform], texts[0], _say)
    report["duration_seconds"] = round(time.perf_counter() - started, 1)
    return report


def agreement_rows(
    *, device: str = "auto", documents: int = DOCUMENTS, profile: str = "auto", report: dict[str, Any] | None = None
) -> list[Row]:
    """The lines of agreement and perplexity; measured now, or read from a `report` of `measure`."""
    found = (measure(device, documents, profile) if report is None else report)["agreement"]
    pooled, count = found["pooled"], len(found["documents"])
    long = [piece for piece in found["by_position"] if piece["start"] >= _LONG]
    change = _perplexity_change(long)
    worst = max((pooled["perplexity_change"], change), key=abs)
    place = f"{count} real documents, 2K to 8K"
    return [
        Row(
            f"same most likely next token as dense, {place}",
            f">= {100 * AGREEMENT:g} %",
            "",
            f"{100 * pooled['agreement']:.2f} % (density {pooled['density']:.3f}, KL {pooled['mean_kl_nats']:.5f})",
            pooled["agreement"] >= AGREEMENT and count >= DOCUMENTS,
            {"documents": found["documents"], "by_position": found["by_position"]},
        ),
        Row(
            f"perplexity against dense, {place}",
            f"within {100 * PERPLEXITY_CHANGE:g} %",
            "",
            f"{100 * pooled['perplexity_change']:+.2f} % ({100 * change:+.2f} % from 4K on)",
            abs(worst) <= PERPLEXITY_CHANGE,
        ),
    ]


def _perplexity_change(pieces: Sequence[dict[str, Any]]) -> float:
    if not pieces:
        return math.inf
    positions = sum(piece["positions"] for piece in pieces)
    nats = sum(piece["positions"] * math.log1p(piece["perplexity_change"]) for piece in pieces)
    return math.expm1(nats / positions)


def _say(line: str) -> None:
    print(f"     {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--profile", default="auto", help="as sale-prefill evaluate takes it")
    parser.add_argument("--error-budget", type=float, help="level of the profile; default its own")
    parser.add_argument("--attention", action="store_true", help="attention's outputs, too")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    report = measure(options.device, options.documents, options.profile, options.error_budget, options.attention)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    for row in agreement_rows(report=report):
        print(f"{row.line}: {row.required}; measured {row.measured}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
