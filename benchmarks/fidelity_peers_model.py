"""SALE's selection beside other methods' on a model: agreement with dense attention and a needle, at equal density.

    python -m benchmarks.fidelity_peers_model [--model NAME] [--device cuda] [--tokens N] [--documents N] [--needles N]
                                              [--densities D ...] [--methods NAME ...] [--json FILE]

Every method runs whole prompts through the attention backend "peers". Its knob is one for all heads of the model, so
that their mean density on the first document is the one asked for, a head's density being the method's own business;
with --by-head, every head has the density asked for. Positions before 1,024 are dense in every method.

- Agreement: positions from 2,048 on whose most likely next token is dense attention's, KL and perplexity.
- Needle: a code planted at even depths of real text, asked for at the end. Its digits are given to the model
  one by one; counted are items with every digit the most likely token, and the log-likelihood of a digit.

Run in float32: bfloat16 alone turns 2 % of the default model's next tokens (`sale_fidelity.agreement`).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu_rows import Row, information, print_rows, write_rows
from benchmarks.texts import documents, english_reference
from sale_attention import LayerPolicy
from sale_attention.transformers_integration import AttentionContext, attention_context
from sale_fidelity.agreement import FIRST_POSITION, Reference, compare, dense_reference, pooled
from sale_fidelity.models import FidelityModel, load_model
from sale_fidelity.peers import Method, methods
from sale_fidelity.peers.backend import NAME, EachHead, OneKnob, Survey, using

DENSITIES = (0.2, 0.3)
TOKENS, DOCUMENTS, NEEDLES = 6144, 3, 12
_DIGITS = 6
_CITIES = (
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Kyoto",
    "Quito",
    "Tallinn",
    "Hanoi",
    "Denver",
    "Lima",
    "Perth",
    "Riga",
    "Turin",
)


@dataclass(frozen=True)
class NeedleItem:
    """A prompt with its answer at the end, of which the last `answer_tokens` tokens are the code."""

    token_ids: tuple[int, ...]
    answer_tokens: int
    depth: float


@dataclass(frozen=True)
class NeedleScore:
    """Over some items.

    Attributes:
        found: share of items whose every answer token is the most likely one.
        log_likelihood: of an answer token, nats, mean.
    """

    found: float
    log_likelihood: float


@dataclass(frozen=True)
class MethodResult:
    """One method at one density."""

    method: str
    density: float
    agreement: float
    kl: float
    perplexity_change: float
    needle: NeedleScore


def needle_items(model: FidelityModel, tokens: int, count: int, seed: int = 0) -> list[NeedleItem]:
    """`count` prompts of about `tokens` tokens of the language reference, the codes at even depths."""
    draw = random.Random(seed)
    items = []
    for index in range(count):
        city, code = draw.choice(_CITIES), "".join(draw.choice("0123456789") for _ in range(_DIGITS))
        text = english_reference(tokens - 96, model.tokenizer, offset=draw.randrange(200_000))
        depth = (index + 0.5) / count
        place = int(depth * len(text))
        needle = model.encode(f"\n\nThe access code of the {city} office is {code}.\n\n")
        question = model.encode(
            f"\n\nWhat is the access code of the {city} office?\nThe access code of the {city} office is"
        )
        answer = model.encode(f" {code}")
        ids = (*text[:place], *needle, *text[place:], *question, *answer)
        items.append(NeedleItem(ids, len(answer), depth))
    return items


@torch.inference_mode()
def score_needles(model: FidelityModel, items: Sequence[NeedleItem], context: AttentionContext) -> NeedleScore:
    """Runs each prompt, answer included, in one piece under `context`."""
    found, likelihoods = 0, []
    for item in items:
        with attention_context(context):
            hidden = model.hidden_states(item.token_ids)[-item.answer_tokens - 1 : -1]
        log_probabilities = torch.log_softmax(model.logits(hidden), dim=-1)
        answer = torch.tensor(item.token_ids[-item.answer_tokens :], device=log_probabilities.device)
        found += int(bool((log_probabilities.argmax(dim=-1) == answer).all()))
        likelihoods.append(float(log_probabilities.gather(1, answer.unsqueeze(1)).mean()))
    return NeedleScore(found / len(items), sum(likelihoods) / len(likelihoods))


def measure_method(
    model: FidelityModel,
    method: Method,
    density: float,
    references: Sequence[Reference],
    needles: Sequence[NeedleItem],
    *,
    by_head: bool = False,
) -> MethodResult:
    """One method through documents and needles, its knob from the first document."""
    policies = [LayerPolicy.uniform(model.num_query_heads)] * model.num_layers
    chooser: EachHead | OneKnob = EachHead(method, density)
    if not by_head:
        survey = Survey(method, density)
        with using(survey):
            compare(model, references[0], policies, backend=NAME)
        chooser = survey.one_knob()
    with using(chooser):
        agreement = pooled([compare(model, reference, policies, backend=NAME) for reference in references])
        reached = sum(chooser.densities) / len(chooser.densities)
        needle = score_needles(model, needles, AttentionContext(policies=policies, backend=NAME))
    return MethodResult(
        method.name, reached, agreement.agreement, agreement.mean_kl, agreement.perplexity_change, needle
    )


def model_rows(
    model: FidelityModel,
    *,
    tokens: int = TOKENS,
    document_count: int = DOCUMENTS,
    needle_count: int = NEEDLES,
    densities: Sequence[float] = DENSITIES,
    compared: Sequence[Method] | None = None,
    by_head: bool = False,
    on_method: Callable[[MethodResult], object] = lambda result: None,
) -> list[Row]:
    """A line for each method and density, for information; the dense model's needle score first."""
    texts = list(documents(tokens, model.tokenizer).values())[:document_count]
    references = [dense_reference(model, text) for text in texts]
    needles = needle_items(model, tokens, needle_count)
    dense = score_needles(model, needles, AttentionContext(dense=True))
    rows = [information("needle, dense", _needle_text(dense), **asdict(dense))]
    for density in densities:
        for method in methods() if compared is None else compared:
            result = measure_method(model, method, density, references, needles, by_head=by_head)
            on_method(result)
            title = f"{method.name} at {'each head' if by_head else 'mean'} density {density:g} ({result.density:.3f})"
            measured = (
                f"agrees {result.agreement:.2%}, KL {result.kl:.4f}, perplexity {result.perplexity_change:+.2%}; "
                f"{_needle_text(result.needle)}"
            )
            rows.append(information(title, measured, tokens=tokens, first=FIRST_POSITION, **asdict(result)))
    return rows


def _needle_text(score: NeedleScore) -> str:
    return f"needle {score.found:.0%}, {score.log_likelihood:.3f} nats a token"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--needles", type=int, default=NEEDLES)
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--methods", nargs="+", help="names, as the table shows them; all by default")
    parser.add_argument("--by-head", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    known = {method.name: method for method in methods()}
    if unknown := sorted(set(options.methods or ()) - set(known)):
        parser.error(f"no method named {unknown[0]!r}; there are {', '.join(known)}")
    started = time.perf_counter()

    def tell(result: MethodResult) -> None:
        print(f"{time.perf_counter() - started:6.0f} s: {result.method}", file=sys.stderr, flush=True)

    rows = model_rows(
        model,
        tokens=options.tokens,
        document_count=options.documents,
        needle_count=options.needles,
        densities=options.densities,
        compared=[known[name] for name in options.methods] if options.methods else None,
        by_head=options.by_head,
        on_method=tell,
    )
    print_rows(rows)
    if options.json:
        command = "python -m benchmarks.fidelity_peers_model " + " ".join(
            sys.argv[1:] if arguments is None else arguments
        )
        write_rows(options.json, rows, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
