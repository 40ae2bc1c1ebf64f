"""Dense against SALE on one model: predictions, retrieval, attention outputs. What comes out is JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from sale_prefill_client._version import __version__

from .. import agreement
from ..models import FidelityModel
from . import retrieval
from .attention_error import DrawnMask, HeadErrors, drawn_mask, head_errors, typical_head
from .documents import EvaluationDocument
from .haystack import Haystack
from .setting import EvaluationSetting

FORMAT = "sale-prefill-evaluation"
VERSION = 1
PARTS = ("agreement", "retrieval", "attention")
#: Perplexity is reported for pieces of this many positions.
_POSITIONS = 1024

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What to measure.

    Attributes:
        parts: of `PARTS`.
        documents: for agreement; attention's outputs are measured on the first.
        first_position: from which predictions are compared.
        plan: retrieval items.
        haystack: their text; None for the bundled one.
    """

    parts: Sequence[str]
    documents: Sequence[EvaluationDocument]
    first_position: int
    plan: retrieval.Plan
    haystack: Haystack | None = None


def evaluate(
    model: FidelityModel,
    setting: EvaluationSetting,
    work: Work,
    others: Sequence[EvaluationSetting] = (),
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measures what `work` asks for.

    Args:
        model: in float32 as a rule: in bfloat16 two exact dense kernels differ by as much as SALE does.
        setting: what is compared with dense attention.
        work: the parts.
        others: settings whose attention errors are shown beside.
        on_progress: told about each document and item.

    Raises:
        ValueError: a document or a length that does not fit the model.
    """
    report = header(model, setting)
    if "agreement" in work.parts:
        report["agreement"] = compare_documents(model, setting, work.documents, work.first_position, on_progress)
    if "retrieval" in work.parts:
        report["retrieval"] = compare_retrieval(model, setting, work.plan, work.haystack, on_progress)
    if "attention" in work.parts:
        report["attention"] = compare_attention(model, [setting, *others], work.documents[0], on_progress)
    return report


def header(model: FidelityModel, setting: EvaluationSetting) -> dict[str, Any]:
    """What a result must be read with."""
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model.name,
        "device": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "setting": setting.name,
        "backend": setting.backend,
        "versions": {
            "sale-prefill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def compare_documents(
    model: FidelityModel,
    setting: EvaluationSetting,
    documents: Sequence[EvaluationDocument],
    first_position: int,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Next-token predictions of each document: pooled, by document, and by position."""
    found = []
    for document in documents:
        reference = agreement.dense_reference(model, document.token_ids, first_position, setting.backend)
        found.append(agreement.compare(model, reference, setting.policies, setting.config, setting.backend))
        on_progress(f"{document.name}: {100 * found[-1].agreement:.2f} % of next tokens agree")
    pooled = agreement.pooled(found)
    last = int(pooled.position.max()) + 1
    starts = range(first_position - first_position % _POSITIONS, last, _POSITIONS)
    pieces = [(max(start, first_position), min(start + _POSITIONS, last)) for start in starts]
    return {
        "first_position": first_position,
        "pooled": _agreement(pooled),
        "documents": [
            {"name": document.name, "digest": document.digest, "tokens": len(document.token_ids), **_agreement(part)}
            for document, part in zip(documents, found, strict=True)
        ],
        "by_position": [{"start": a, "end": b, **_agreement(pooled.between(a, b))} for a, b in pieces],
    }


def compare_retrieval(
    model: FidelityModel,
    setting: EvaluationSetting,
    plan: retrieval.Plan,
    haystack: Haystack | None = None,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Retrieval items, summarised and one by one."""

    def show(outcome: retrieval.Outcome) -> None:
        on_progress(
            f"{outcome.task}, {outcome.tokens} tokens: margins dense {outcome.dense_margin:.2f}, "
            f"SALE {outcome.sale_margin:.2f}"
        )

    outcomes = retrieval.run_plan(model, plan, setting, haystack, show)
    return {"seed": plan.seed, "summary": retrieval.summarise(outcomes), "items": retrieval.outcome_rows(outcomes)}


def compare_attention(
    model: FidelityModel,
    settings: Sequence[EvaluationSetting],
    document: EvaluationDocument,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Output errors of the first setting by head, of all settings pooled, and one head's blocks."""
    layers = iter(range(model.num_layers))
    measured = head_errors(model, document.token_ids, settings, lambda: on_progress(f"layer {next(layers)} measured"))
    first = measured[0]
    mask = drawn_mask(model, document.token_ids, settings[0], *typical_head(first))
    return {
        "document": document.name,
        "tokens": len(document.token_ids),
        "settings": [_errors(errors) for errors in measured],
        "density_by_head": _rounded(first.density),
        "mean_error_by_head": _rounded(first.mean_error),
        "p99_error_by_head": _rounded(first.p99_error),
        "mask": _mask(mask, settings[0]),
    }


def _agreement(part: agreement.Agreement) -> dict[str, float]:
    return {
        "positions": len(part.position),
        "agreement": part.agreement,
        "mean_kl_nats": part.mean_kl,
        "perplexity": part.perplexity,
        "dense_perplexity": part.dense_perplexity,
        "perplexity_change": part.perplexity_change,
        "density": part.density,
    }


def _errors(errors: HeadErrors) -> dict[str, Any]:
    return {
        "name": errors.setting.name,
        "density": round(float(errors.density.mean()), 5),
        "mean_error": errors.pooled_mean_error,
        "p99_error": errors.pooled_p99_error,
        "estimated_cost": errors.cost,
    }


def _mask(mask: DrawnMask, setting: EvaluationSetting) -> dict[str, Any]:
    """One digit a block, a string a query block."""
    return {
        "layer": mask.layer,
        "head": mask.head,
        "density": mask.density,
        "query_block": setting.config.query_block,
        "key_block": setting.config.key_block,
        "rows": ["".join(map(str, row)) for row in mask.cells.tolist()],
    }


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in values.tolist()]
