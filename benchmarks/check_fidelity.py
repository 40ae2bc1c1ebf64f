"""`make check-fidelity`: what SALE with its calibrated profile loses, measured; and that the guard sees when it does.

    python -m benchmarks.check_fidelity [--only PART ...] [--device cpu|cuda] [--traces DIR] [--json FILE]

Prints every promise with required and measured, and fails where one falls short. A whole run is written to
`benchmarks/results/fidelity.json`, some parts of it to `fidelity-partial.json`, which git ignores. The part `peers`
needs the traces (`benchmarks/attention_traces.py` says where); `first_token` is for a CPU on which nothing else runs.
What is missing makes its lines fail.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_rows import Row, information, print_rows, write_rows
from benchmarks.report import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
#: Time to the first token over that of the faster dense server.
SPEEDUP = 1.5
_TAIL = 4000
_SAMENESS = ["tests/conformance/test_conformance.py"]
_REFUSALS = ["tests/unit/attention/test_attention_profile.py", "tests/integration/test_profile.py"]


@dataclass(frozen=True)
class Plan:
    """Where to measure, and on what."""

    device: str = "auto"
    traces: Path | None = None
    profile: str = "auto"


def agreement_rows(plan: Plan) -> list[Row]:
    """Next tokens and perplexity on ten documents."""
    from benchmarks import fidelity_agreement

    return fidelity_agreement.agreement_rows(device=plan.device, profile=plan.profile)


def retrieval_rows(plan: Plan) -> list[Row]:
    """The committed run of 1,500 items, and twenty of them again."""
    from benchmarks import fidelity_retrieval

    return fidelity_retrieval.retrieval_rows(device=plan.device, profile=plan.profile)


def first_token_rows(plan: Plan) -> list[Row]:
    """The default model through gRPC, with its profile and dense."""
    from benchmarks import check_attention
    from benchmarks.served import question_prompt, serving_each
    from benchmarks.texts import PASSWORD
    from sale_prefill_server.models import DEFAULT_MODEL

    if _device(plan) != "cpu":
        return [information("time to the first token", "is promised on a CPU; this runs on a GPU")]
    tokens = check_attention.Plan.served
    sale = ["--attention", "sale", "--profile", plan.profile]
    with serving_each({"SALE": sale, **check_attention.dense_servers(tokens)}) as servers:
        tokenizer = servers["SALE"].client.tokenizer()
        prompt = question_prompt(tokens, tokenizer, PASSWORD, check_attention.DOCUMENT_OFFSET)
        runs = check_attention.alternate(servers, prompt, check_attention.SERVED_ROUNDS)
    seconds = {name: statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    dense = min(value for name, value in seconds.items() if name != "SALE")
    speedup = dense / seconds["SALE"]
    density = runs["SALE"][0].stats.density
    return [
        Row(
            f"{DEFAULT_MODEL} with its profile, {len(prompt)} tokens: time to the first token, CPU",
            f">= {SPEEDUP:g}x over dense",
            "",
            f"{speedup:.2f}x: {seconds['SALE']:.1f} s, dense {dense:.1f} s; density {density:.3f}",
            speedup >= SPEEDUP,
            {"seconds": {name: [run.seconds for run in taken] for name, taken in runs.items()}},
        )
    ]


def paper_rows(plan: Plan) -> list[Row]:
    """The same p99 row error as the paper's calibration, with fewer blocks."""
    rows: list[Row] = importlib.import_module("benchmarks.fidelity_calibration").paper_rows(device=plan.device)
    return rows


def peer_rows(plan: Plan) -> list[Row]:
    """Other methods' selection rules at the same density and cost, on the real traces."""
    from benchmarks import fidelity_peers

    return fidelity_peers.peer_rows(fidelity_peers.load_all(plan.traces, None, torch.device(_device(plan))))


def sameness_rows(plan: Plan) -> list[Row]:
    """The conformance kit, which says what the same selection is."""
    return [pytest_row("same selection on every backend and chunk size (conformance kit)", _SAMENESS)]


def guard_rows(plan: Plan) -> list[Row]:
    """A planted fault, and healthy requests."""
    from benchmarks import fidelity_guard

    profile = None if plan.profile == "auto" else Path(plan.profile)
    return fidelity_guard.guard_rows(device=plan.device, profile=profile)


def refusal_rows(plan: Plan) -> list[Row]:
    """Profiles that must be refused."""
    return [
        pytest_row("a profile of another model, cut short, edited, with a NaN: refused, the field named", _REFUSALS)
    ]


PARTS: dict[str, Callable[[Plan], list[Row]]] = {
    "agreement": agreement_rows,
    "first_token": first_token_rows,
    "retrieval": retrieval_rows,
    "paper": paper_rows,
    "peers": peer_rows,
    "sameness": sameness_rows,
    "guard": guard_rows,
    "refusals": refusal_rows,
}


def pytest_row(line: str, tests: Sequence[str]) -> Row:
    """pytest over `tests`; what it leaves out is told, and nothing at all passes for nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr[-200:]
    passed = done.returncode == 0 and "passed" in last
    if not passed:
        print(done.stdout[-_TAIL:])
    return Row(line, "all pass", "", last, passed)


def run_part(name: str, plan: Plan) -> list[Row]:
    """The lines of one part; one line that says so where it could not be measured."""
    started = time.perf_counter()
    try:
        return PARTS[name](plan)
    except (Exception, SystemExit) as error:  # the other lines are worth having
        traceback.print_exc()
        return [Row(name, "is measured", "", f"failed: {str(error) or type(error).__name__}", False)]
    finally:
        print(f"     {name} took {time.perf_counter() - started:.0f} s", flush=True)


def _device(plan: Plan) -> str:
    if plan.device != "auto":
        return plan.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="as for benchmarks.attention")
    parser.add_argument("--profile", default="auto", metavar="FILE", help="instead of the one of the package")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(arguments)
    plan = Plan(options.device, options.traces, options.profile)
    whole = options.only is None and plan.profile == "auto"
    file = options.json or (RESULTS if whole else RESULTS.with_name("fidelity-partial.json"))
    command = " ".join(["python -m benchmarks.check_fidelity", *(sys.argv[1:] if arguments is None else arguments)])
    rows: list[Row] = []
    for name in options.only or PARTS:
        rows += run_part(name, plan)
        write_rows(file, rows, command)  # a run that is cut short leaves what it has
    print_rows(rows)
    required = [row for row in rows if row.required]
    print(f"\n{sum(row.passed for row in required)} of {len(required)} lines hold; written to {file}")
    return 0 if all(row.passed for row in required) else 1


if __name__ == "__main__":
    sys.exit(main())
