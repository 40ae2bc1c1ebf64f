"""Retrieval, dense against SALE, item by item: how many each solves, and how much worse SALE may be with confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sale_attention import AttentionStatistics
from sale_attention.transformers_integration import AttentionContext

from ..models import FidelityModel
from .haystack import Haystack, bundled_paragraphs
from .paired import CONFIDENCE, worst_loss
from .scoring import EncodedItem, candidate_scores, encode_item, margin
from .setting import EvaluationSetting
from .tasks import TASKS, Item, make_item

#: Prompt lengths in tokens.
LENGTHS = (2048, 3072, 4096, 6144, 8064)
#: Depths at which answers are planted, as shares of the document.
DEPTHS = tuple((index + 0.5) / 10 for index in range(10))


@dataclass(frozen=True)
class Outcome:
    """One item, both ways. Margins: how much likelier the least likely right candidate is than the best wrong, nats."""

    task: str
    seed: int
    tokens: int
    depth: float
    digest: str
    dense_margin: float
    sale_margin: float
    density: float

    @property
    def is_dense_right(self) -> bool:
        """Whether dense attention solves it."""
        return self.dense_margin > 0

    @property
    def is_sale_right(self) -> bool:
        """Whether SALE solves it."""
        return self.sale_margin > 0


@dataclass(frozen=True)
class Plan:
    """Which items: `count` of them, each task, length and depth as often as any other.

    Items of one plan are the first of any longer plan with the same tasks, lengths and seed.
    """

    count: int
    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[int] = LENGTHS
    seed: int = 0

    def arguments(self) -> Iterator[tuple[str, int, int, float]]:
        """Task, seed, tokens and depth of each item, as `make_item` takes them."""
        for index in range(self.count):
            round_, task = divmod(index, len(self.tasks))
            rest, length = divmod(round_, len(self.lengths))
            yield self.tasks[task], self.seed + index, self.lengths[length], DEPTHS[_spread(rest)]


def haystack_of(model: FidelityModel, paragraphs: Sequence[str] | None = None) -> Haystack:
    """The bundled text, or another, in the model's tokens."""
    chosen = bundled_paragraphs() if paragraphs is None else paragraphs
    return Haystack(chosen, lambda text: len(model.encode(text)))


def run_item(model: FidelityModel, encoded: EncodedItem, setting: EvaluationSetting) -> Outcome:
    """Scores one item dense and with SALE."""
    item, statistics = encoded.item, AttentionStatistics()
    dense = candidate_scores(model, encoded, AttentionContext(dense=True, backend=setting.backend))
    sale = candidate_scores(model, encoded, setting.context(len(encoded.prompt_ids), statistics))
    dense_margin, sale_margin = (round(margin(scores.tolist(), item.num_right), 5) for scores in (dense, sale))
    density = round(statistics.density, 5)
    return Outcome(item.task, item.seed, item.tokens, item.depth, encoded.digest, dense_margin, sale_margin, density)


def run_plan(
    model: FidelityModel,
    plan: Plan,
    setting: EvaluationSetting,
    haystack: Haystack | None = None,
    on_item: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Every item of `plan`, in order.

    Args:
        model: what answers.
        plan: which items.
        setting: how SALE runs.
        haystack: the text; default the bundled one.
        on_item: shown each as it is done.

    Raises:
        ValueError: a length that the model's context or a task does not allow.
    """
    text = haystack or haystack_of(model)
    outcomes = []
    for task, seed, tokens, depth in plan.arguments():
        outcomes.append(run_item(model, encode_item(model, make_item(task, text, seed, tokens, depth)), setting))
        if on_item is not None:
            on_item(outcomes[-1])
    return outcomes


def again(model: FidelityModel, outcome: Mapping[str, Any], haystack: Haystack) -> EncodedItem:
    """The item of a recorded outcome, made again; its digest tells whether it is the same."""
    item: Item = make_item(outcome["task"], haystack, outcome["seed"], outcome["tokens"], outcome["depth"])
    return encode_item(model, item)


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracies, differing pairs, and the upper bound on what SALE loses, one-sided; pooled, by task and by length."""
    tasks, lengths = (sorted({getattr(outcome, name) for outcome in outcomes}) for name in ("task", "tokens"))
    return {
        "confidence": CONFIDENCE,
        "pooled": _accuracy(outcomes),
        "by_task": {task: _accuracy([one for one in outcomes if one.task == task]) for task in tasks},
        "by_tokens": {str(length): _accuracy([one for one in outcomes if one.tokens == length]) for length in lengths},
    }


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(outcome) for outcome in outcomes]


def _accuracy(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    count = len(outcomes)
    dense, sale = (sum(getattr(one, name) for one in outcomes) for name in ("is_dense_right", "is_sale_right"))
    lost = sum(one.is_dense_right and not one.is_sale_right for one in outcomes)
    won = sum(one.is_sale_right and not one.is_dense_right for one in outcomes)
    return {
        "items": count,
        "dense_accuracy": dense / count,
        "sale_accuracy": sale / count,
        "lost": lost,
        "won": won,
        "worst_loss": worst_loss(count, lost, won),
        "mean_margin_change": sum(one.sale_margin - one.dense_margin for one in outcomes) / count,
        "density": sum(one.density for one in outcomes) / count,
    }


def _spread(index: int) -> int:
    """0, 3, 6, 9, 2, …: few items already reach all over the document."""
    return index * 3 % len(DEPTHS)
