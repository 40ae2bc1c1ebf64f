"""Retrieval on the default model, dense against its profile: the whole run, and a look at a committed one.

    python -m benchmarks.fidelity_retrieval --device cuda --output retrieval.json [--items 2000]

The whole run is for a GPU, in float32 but for what goes into attention (float16), so that what differs is what SALE
dropped; its result is committed with every item's outcome and a hash of the source that determines it. `retrieval_rows`
reads that, holds the hash against the source that is here, makes every item again to compare digests, and runs twenty
of them again, in float32 throughout on a CPU.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import Row
from benchmarks.report import ROOT, provenance
from sale_fidelity import half
from sale_fidelity.evaluation import retrieval
from sale_fidelity.evaluation.evaluate import compare_retrieval, header
from sale_fidelity.evaluation.setting import EvaluationSetting, find_profile, profile_setting
from sale_fidelity.models import FidelityModel, load_model
from sale_prefill_server.models import DEFAULT_MODEL

RESULT = ROOT / "benchmarks" / "results" / "retrieval.json"
#: What a run has, and what it must have at least: more items, a narrower bound. Whole rounds of tasks, lengths, depths.
ITEMS, LEAST_ITEMS = 2000, 1500
#: Most accuracy that SALE may lose, by the confidence bound.
LOSS = 0.01
RERUN = 20
#: Items that are run again are short ones, as many as fit three minutes on two cores.
_RERUN_TOKENS = 2048
#: A GPU's run rounds what goes into attention to float16, and a block at its threshold may fall to the other side.
#: Twenty items against float32 on a CPU: dense margins differ by 0.031 nats at most.
_DENSE_NATS = 0.1
_SALE_NATS = 0.5
_FILES = (
    *("server/sale_attention/**/*.py", "csrc/include/**/*.h"),
    *("server/sale_fidelity/*.py", "server/sale_fidelity/evaluation/*.py"),
    "server/sale_fidelity/evaluation/haystack.txt",
)
#: Kernels of the device that made the result; that others select the same is the conformance kit's to show, and twenty
#: items are run again on the device at hand.
_CPU_KERNELS = ("csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp")
_GPU_KERNELS = ("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cuh")
#: They show results and do not make them.
_WITHOUT = ("command.py", "table.py", "figures.py", "cli.py", "documents.py", "attention_error.py")
_COMMENTS = ("#", "//")


def code_hash(profile_digest: str, device: str, root: Path = ROOT) -> str:
    """SHA-256 over the source that determines outcomes, and the profile; what only explains it does not count.

    That is docstrings, comment lines, empty lines, and kernels of devices other than `device` ("cpu" or a GPU's name).
    """
    patterns = (*_FILES, *(_CPU_KERNELS if device == "cpu" else _GPU_KERNELS))
    files = sorted({file for pattern in patterns for file in root.glob(pattern) if file.name not in _WITHOUT})
    digest = hashlib.sha256(profile_digest.encode())
    for file in files:
        text = file.read_text(encoding="utf-8")
        explained = _docstring_lines(text) if file.suffix == ".py" else set()
        lines = (line.rstrip() for number, line in enumerate(text.splitlines(), 1) if number not in explained)
        kept = [line for line in lines if line and not line.lstrip().startswith(_COMMENTS)]
        digest.update("\n".join([str(file.relative_to(root)), *kept, ""]).encode())
    return digest.hexdigest()


def _docstring_lines(source: str) -> set[int]:
    """Numbers of the lines, from 1 on, that a Python file's docstrings take up."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            found.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


@dataclass(frozen=True)
class _Rest(retrieval.Plan):
    """A plan without its first items."""

    done: int = 0

    def arguments(self) -> Iterator[tuple[str, int, int, float]]:
        """As of the plan, from item `done` on."""
        return itertools.islice(super().arguments(), self.done, None)


def measure(
    device: str = "auto",
    items: int = ITEMS,
    profile: str = "auto",
    error_budget: float | None = None,
    seed: int = 0,
    resume: Path | None = None,
) -> dict[str, Any]:
    """The whole run. `profile` and `error_budget` as `sale-prefill evaluate` takes them.

    Args:
        resume: a shorter run of this source and seed on a device of the same name, whose items are taken over.

    Raises:
        ValueError: that run is of something else.
    """
    model = load_model(DEFAULT_MODEL, device=device, dtype="float32")
    found = find_profile(model, profile)
    setting = profile_setting(model, found, error_budget=error_budget)
    if model.device.type == "cuda":  # its kernels take no float32
        setting = replace(setting, backend=half.NAME)
    started, done = time.perf_counter(), 0

    def count(_: str) -> None:
        nonlocal done
        done += 1
        if done % 50 == 0:
            print(f"     {done} of {items} items, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    about = header(model, setting)
    about["code_hash"] = code_hash(found.digest, about["device"])
    earlier = _earlier(resume, about, seed)
    plan = _Rest(items, seed=seed, done=len(earlier))
    result = compare_retrieval(model, setting, plan, on_progress=count)
    if earlier:
        outcomes = [retrieval.Outcome(**one) for one in (*earlier, *result["items"])]
        rows = retrieval.outcome_rows(outcomes)
        result = {"seed": seed, "summary": retrieval.summarise(outcomes), "items": rows}
    return {
        **about,
        "provenance": provenance("python -m benchmarks.fidelity_retrieval"),
        "resumed_after_items": len(earlier),
        "error_budget": setting.level.error_budget if setting.level else None,
        "duration_seconds": round(time.perf_counter() - started, 1),
        "retrieval": result,
    }


def _earlier(file: Path | None, about: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    if file is None:
        return []
    found = json.loads(file.read_text())
    same = ("code_hash", "device", "dtype", "backend", "setting", "versions")
    different = [name for name in same if found[name] != about[name]]
    if different or found["retrieval"]["seed"] != seed:
        raise ValueError(f"{file} is of another run: {', '.join(different) or 'seed'} differs; leave --resume out")
    items: list[dict[str, Any]] = found["retrieval"]["items"]
    return items


def retrieval_rows(
    file: Path = RESULT, *, device: str = "auto", rerun: int = RERUN, profile: str = "auto", items: int = LEAST_ITEMS
) -> list[Row]:
    """The lines of a committed run: its bound, its hash, its items, twenty of them run again.

    Args:
        file: the result.
        device: where to run again.
        rerun: how many.
        profile: the one the result was made with.
        items: how many it must hold.
    """
    line = "retrieval, pooled: SALE is worse than dense by at most, one-sided 95 %"
    if not file.exists():
        return [Row(line, "<= 1 point", "", f"no {file.name}: run python -m benchmarks.fidelity_retrieval", False)]
    result = json.loads(file.read_text())
    recorded: list[dict[str, Any]] = result["retrieval"]["items"]
    # From the items, not from the summary that stands beside them.
    found = retrieval.summarise([retrieval.Outcome(**one) for one in recorded])["pooled"]
    measured = (
        f"{100 * found['worst_loss']:.2f} points: dense {100 * found['dense_accuracy']:.1f} %, SALE "
        f"{100 * found['sale_accuracy']:.1f} %, {found['lost']} lost, {found['won']} won"
    )
    rows = [
        Row(line, "<= 1 point", "", measured, found["worst_loss"] <= LOSS, found),
        Row(
            "... items, each a prompt of its own",
            f">= {items}",
            "",
            str(_different(recorded)),
            _different(recorded) >= items,
        ),
    ]
    model = load_model(DEFAULT_MODEL, device=device, dtype="float32")
    chosen = find_profile(model, profile)
    fresh = code_hash(chosen.digest, result["device"])
    shown = "the same" if fresh == result["code_hash"] else "differs: run python -m benchmarks.fidelity_retrieval"
    rows.append(Row("... the result's code hash", "that of this source", "", shown, fresh == result["code_hash"]))
    setting = profile_setting(model, chosen, error_budget=result["error_budget"])
    return [*rows, *_run_again(model, setting, recorded, rerun)]


def _different(recorded: Sequence[Mapping[str, Any]]) -> int:
    return len({one["digest"] for one in recorded})


def _run_again(
    model: FidelityModel, setting: EvaluationSetting, recorded: Sequence[Mapping[str, Any]], count: int
) -> list[Row]:
    """Makes every item again, and scores some again."""
    haystack = retrieval.haystack_of(model)
    strangers = sum(retrieval.again(model, one, haystack).digest != one["digest"] for one in recorded)
    rows = [
        Row(
            "... items made again that are the same",
            "all",
            "",
            f"all but {strangers}" if strangers else "all",
            not strangers,
        )
    ]
    chosen = _chosen(recorded, count)
    differing = []
    for place, one in enumerate(chosen, 1):
        print(f"     again: item {place} of {len(chosen)}", end="\r", file=sys.stderr, flush=True)
        fresh = retrieval.run_item(model, retrieval.again(model, one, haystack), setting)
        apart = (abs(fresh.dense_margin - one["dense_margin"]), abs(fresh.sale_margin - one["sale_margin"]))
        if apart[0] > _DENSE_NATS or apart[1] > _SALE_NATS or not _agrees(fresh.sale_margin, one["sale_margin"]):
            differing.append({"task": one["task"], "seed": one["seed"], "apart_nats": apart})
    measured = f"{len(chosen) - len(differing)} of {len(chosen)}"
    passed = not differing and len(chosen) == count
    return [
        *rows,
        Row(
            "... items run again here that come out the same",
            f"{count} of {count}",
            "",
            measured,
            passed,
            {"differing": differing},
        ),
    ]


def _agrees(margin: float, recorded: float) -> bool:
    """The same outcome; where both are within rounding of zero, either."""
    return (margin > 0) == (recorded > 0) or max(abs(margin), abs(recorded)) <= _DENSE_NATS


def _chosen(recorded: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Short items, as many of each task, others every time the result changes."""
    short = [one for one in recorded if one["tokens"] <= _RERUN_TOKENS]
    random.Random(recorded[0]["digest"]).shuffle(short)
    tasks = sorted({one["task"] for one in short})
    by_task = [[one for one in short if one["task"] == task] for task in tasks]
    return [group[turn] for turn in range(len(short)) for group in by_task if turn < len(group)][:count]


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole run. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="auto", help="as sale-prefill evaluate takes it")
    parser.add_argument("--error-budget", type=float, help="level of the profile; default its own")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a shorter run, whose items are taken over")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    chosen = (options.device, options.items, options.profile, options.error_budget, options.seed)
    result = measure(*chosen, resume=options.resume)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["retrieval"]["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
