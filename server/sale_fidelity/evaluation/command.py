"""The command `sale-prefill evaluate`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sale_attention import DEFAULT_TAU, Profile, SaleConfig
from sale_attention.config import QUERY_STRIDES
from sale_prefill_server.models import ModelError

from ..models import FidelityModel, load_model
from . import figures
from .documents import default_documents, user_documents
from .evaluate import PARTS, Work, evaluate
from .retrieval import LENGTHS, Plan, haystack_of
from .setting import UNIFORM_BESIDE, EvaluationSetting, find_profile, profile_setting, uniform_setting
from .table import table
from .tasks import TASKS

EXIT_OK = 0
EXIT_ERROR = 1
_POSITION = 2048
#: Default ones.
_DOCUMENTS = 10


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.add_argument("model", help="the default model's name, a directory, a .gguf file or a hub id")
    parser.add_argument(
        "--profile", default="auto", metavar="FILE", help="a file, auto for the one of this package, none for --tau"
    )
    parser.add_argument("--error-budget", type=float, metavar="NATS", help="level of the profile (default: its own)")
    parser.add_argument("--tau", type=float, help=f"without a profile: threshold of all heads (default {DEFAULT_TAU})")
    parser.add_argument("--query-stride", type=int, choices=QUERY_STRIDES, help="without a profile (default 1)")
    parser.add_argument("--query-block", type=int, choices=(64, 128), help="rows of a block (default: the profile's)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="documents (default: English and code)")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="of the ten default ones (default 3)")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of a document (default 8192)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--items", type=int, default=50, metavar="N", help="retrieval items (default 50)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help=f"tokens of an item (default {LENGTHS})")
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="text to hide needles in, a paragraph a line")
    parser.add_argument("--seed", type=int, default=0, help="of the items (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32: see the docs"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON there")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write pictures there")
    if not any(action.dest == "json" for action in parser._actions):
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measures and prints. Returns an exit status."""
    try:
        _check(arguments)
        model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype, on_progress=_say)
        setting, others = _settings(model, arguments)
        report = evaluate(model, setting, _work(model, arguments), others, _say)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    except (ModelError, OSError, ValueError) as error:
        _say(f"sale-prefill evaluate: {error}")
        return EXIT_ERROR
    print(json.dumps(report) if arguments.json else table(report))  # noqa: T201  a command
    if arguments.figures is not None:
        figures.draw(report, arguments.figures)
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before a model is loaded."""
    if arguments.profile != "none" and (arguments.tau, arguments.query_stride) != (None, None):
        raise ValueError("--tau and --query-stride go with --profile none; a profile has its own by head")
    if arguments.profile == "none" and arguments.error_budget is not None:
        raise ValueError("--error-budget names a level of a profile; with --profile none, say --tau")
    if arguments.tau is not None and not 0 <= arguments.tau <= math.inf:
        raise ValueError(f"--tau {arguments.tau}: must be 0 (dense) or above")
    for name in ("items", "documents", "tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if arguments.documents > _DOCUMENTS and arguments.text is None:
        raise ValueError(f"--documents {arguments.documents}: there are {_DOCUMENTS}; name files with --text")
    for flag in ("text", "haystack"):
        given = getattr(arguments, flag) or ()
        for file in (given,) if isinstance(given, Path) else given:
            if not file.is_file():
                raise ValueError(f"--{flag} {file}: no such file")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no folder {arguments.output.parent}; make it first")
    if arguments.figures is not None and not figures.can_draw():
        raise ValueError(figures.WITHOUT_MATPLOTLIB)


def _settings(model: FidelityModel, arguments: argparse.Namespace) -> tuple[EvaluationSetting, list[EvaluationSetting]]:
    """What is evaluated, and what attention errors are shown beside: the profile's other levels, uniform thresholds."""
    if arguments.profile == "none":
        config = SaleConfig() if arguments.query_block is None else SaleConfig(query_block=arguments.query_block)
        tau = DEFAULT_TAU if arguments.tau is None else arguments.tau
        chosen = uniform_setting(model, tau, arguments.query_stride or 1, config)
        return chosen, _uniform_beside(model, config, chosen.name)
    profile: Profile = find_profile(model, arguments.profile)
    options: dict[str, Any] = {"query_block": arguments.query_block}
    chosen = profile_setting(model, profile, error_budget=arguments.error_budget, **options)
    levels = [profile_setting(model, profile, error_budget=level.error_budget, **options) for level in profile.levels]
    others = [level for level in levels if level.name != chosen.name]
    return chosen, others + _uniform_beside(model, chosen.config, chosen.name)


def _uniform_beside(model: FidelityModel, config: SaleConfig, taken: str) -> list[EvaluationSetting]:
    """Thresholds as the paper has them, whatever those of the profile are relative to."""
    config = replace(config, sample_stride=0)
    found = [uniform_setting(model, tau, stride, config) for tau, stride in UNIFORM_BESIDE]
    return [setting for setting in found if setting.name != taken]


def _work(model: FidelityModel, arguments: argparse.Namespace) -> Work:
    tokens = min(arguments.tokens, model.max_tokens)
    parts: Sequence[str] = arguments.parts
    documents = []
    if {"agreement", "attention"} & set(parts):
        documents = (
            user_documents(model, arguments.text, tokens)
            if arguments.text
            else default_documents(model, tokens, arguments.documents)
        )
    lengths = arguments.lengths or [length for length in LENGTHS if length <= model.max_tokens] or [model.max_tokens]
    text = None
    if arguments.haystack is not None:
        lines = [line.strip() for line in arguments.haystack.read_text(encoding="utf-8").splitlines()]
        text = haystack_of(model, [line for line in lines if line])
    plan = Plan(arguments.items, arguments.tasks, lengths, arguments.seed)
    return Work(parts, documents, min(_POSITION, tokens // 2), plan, text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  a command
