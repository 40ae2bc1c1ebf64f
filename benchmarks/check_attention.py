"""`make check-attention`: every promise of the CPU attention, measured on real traces and on the default model.

    python -m benchmarks.check_attention [--only NAME ...]

The promises are for 2 cores with AVX-512 VNNI and BF16. Takes about three quarters of an hour; nothing else should run
beside it. The lengths can be made smaller to try the check itself; nothing is promised of those.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.attention_floor import Ceilings, measure_ceilings
from benchmarks.attention_measure import (
    DenseBaseline,
    Row,
    Setting,
    describe_backend,
    exact_dense,
    l1_error,
    measure,
    require_sparse,
    sale_call,
    sale_config,
)
from benchmarks.attention_traces import Trace, load_trace, locate_traces
from benchmarks.report import ROOT, Report, cpu_features, warn_if_busy
from benchmarks.served import FirstToken, ServedModel, first_token, question_prompt, serving, serving_each
from benchmarks.texts import PASSWORD, english_reference
from sale_attention import DEFAULT_TAU, available_backends
from sale_attention.cpu import ISA_VARIABLE, available_isas
from sale_attention.jit import KernelBuildError
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model

STRIDES = (1, 2)
THREADS = 2
NEEDED_FEATURES = ("avx512_vnni", "avx512_bf16")

#: What is promised. Speed-ups are over the fastest way to call torch's SDPA in bfloat16, measured in the same run.
FULL_SPEEDUP = {1: 4.0, 2: 5.0}
MIDDLE_SPEEDUP = {2: 2.5}
SHORT_SLOWDOWN = 0.03
ESTIMATION_SHARE = {1: 0.13, 2: 0.07}
EXECUTION_GFLOPS = 120.0
ERROR_RATIO = 1.02
SERVED_SPEEDUP = 1.5
LONG_SPEEDUP = 2.0
UNREPORTED_SHARE = 0.05
#: Growth of memory over growth of length; what a process has anyway gives the tenth.
MEMORY_RATIO = 1.1

SERVED_ROUNDS = 3
ANSWER_TOKENS = 48
DOCUMENT_OFFSET = 200_000  # characters into the language reference
YARN_FACTOR = 4.0
REQUIRED_PATHS = {"AVX2": "avx2", "AVX-512": "avx512"}
_SANITIZER_FINDING = re.compile(r"ERROR: \w+Sanitizer|runtime error:")
_SANITIZER_OUTPUT = 4000


@dataclass(frozen=True)
class Plan:
    """What to measure, in tokens; the promises are for the defaults. `dense_rows`: see `Setting`."""

    backend: str = "cpu"
    traces: Path | None = None
    rounds: int | None = None
    dense_rows: int = 0
    full: int = 32768
    middle: int = 8192
    short: tuple[int, ...] = (1024, 2048)
    served: int = 7680
    long: int = 30000


def prefixes(plan: Plan, lengths: Iterable[int]) -> list[tuple[Trace, list[int]]]:
    """Every trace, with those of `lengths` to measure on it.

    Raises:
        SystemExit: a trace is too short.
    """
    wanted, found = sorted(lengths), [load_trace(file) for file in locate_traces(plan.traces)]
    for trace in found:
        if trace.tokens < wanted[-1]:
            raise SystemExit(f"{trace.name} of {trace.model} has {trace.tokens} tokens; this check needs {wanted[-1]}")
    return [(trace, wanted) for trace in found]


def measure_rows(plan: Plan, ceilings: Ceilings) -> list[Row]:
    """Whole attention on every trace, at every length and stride."""
    settings = [Setting(plan.backend, stride, DEFAULT_TAU, plan.dense_rows) for stride in STRIDES]
    baseline, rows = DenseBaseline(), []
    work = prefixes(plan, {*plan.short, plan.middle, plan.full})
    with tqdm(total=sum(len(lengths) for _, lengths in work), desc="attention", unit="cell") as bar:
        for trace, lengths in work:
            for tokens in lengths:
                bar.set_description(f"{trace.name}, {tokens} tokens")
                rows += measure(
                    trace.prefix(tokens),
                    settings,
                    ceilings,
                    baseline,
                    rounds=plan.rounds,
                    on_round=lambda done, total: bar.set_postfix_str(f"round {done} of {total}"),
                )
                bar.update()
    return rows


def check_speed(report: Report, plan: Plan) -> None:
    """Whole attention, estimation and execution on the traces."""
    ceilings = measure_ceilings(torch.device("cpu"))
    rows = measure_rows(plan, ceilings)
    for tokens, promised in ((plan.full, FULL_SPEEDUP), (plan.middle, MIDDLE_SPEEDUP)):
        for stride, least in sorted(promised.items(), reverse=True):
            add_speedup(report, select_rows(rows, tokens, stride), least)
    for tokens in plan.short:
        add_slowdown(report, [row for row in rows if row.tokens == tokens])
    for stride, most in ESTIMATION_SHARE.items():
        add_estimation(report, select_rows(rows, plan.full, stride), most)
    for stride in STRIDES:
        add_execution(report, select_rows(rows, plan.full, stride), ceilings)


def select_rows(rows: Sequence[Row], tokens: int, stride: int) -> list[Row]:
    """Rows of one length and stride, one a trace."""
    return [row for row in rows if row.tokens == tokens and row.setting.stride == stride]


def add_speedup(report: Report, rows: Sequence[Row], least: float) -> None:
    """The line of one length and stride."""
    found = [row.speedup.median for row in rows]
    speedup = statistics.median(found)
    floor = statistics.median(row.dense_seconds.median / row.floor.total for row in rows)
    report.add(
        f"whole attention against torch SDPA bf16, {_place(rows)}",
        f">= {least:g}x",
        f"{speedup:.2f}x ({min(found):.2f}-{max(found):.2f} by trace; {floor:.1f}x at the floor)",
        speedup >= least,
        rows=[asdict(row) for row in rows],
    )


def add_slowdown(report: Report, rows: Sequence[Row]) -> None:
    """The line of a short length, all strides: the slowest row counts."""
    worst = max(1 / row.speedup.median - 1 for row in rows)
    report.add(
        f"whole attention against torch SDPA bf16, {rows[0].tokens} tokens, worst trace, any stride",
        f"<= {SHORT_SLOWDOWN:.0%} slower",
        f"{abs(worst):.1%} {'slower' if worst > 0 else 'faster'}",
        worst <= SHORT_SLOWDOWN,
        rows=[asdict(row) for row in rows],
    )


def add_estimation(report: Report, rows: Sequence[Row], most: float) -> None:
    """The line of one stride: the select phase; what precedes it is shown as well."""
    shares = {
        name: statistics.median(row.dense_shares[name] for row in rows) for name in ("select", "quantise", "sink_local")
    }
    floor = statistics.median(row.floor.estimation / row.dense_seconds.median for row in rows)
    report.add(
        f"estimation (products, max, compare), share of dense time, {_place(rows)}",
        f"<= {most:.0%}",
        f"{shares['select']:.1%} (floor {floor:.1%}; besides: quantise {shares['quantise']:.1%}, "
        f"sink-local {shares['sink_local']:.1%})",
        shares["select"] <= most,
        shares=shares,
        floor=floor,
    )


def add_execution(report: Report, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """The line of one stride: blocks that sparse rows attend to, over the time of the compute phase alone."""
    rate = statistics.median(row.execution_gflops or 0.0 for row in rows)
    dense = statistics.median(row.dense_gflops for row in rows)
    ceiling = ceilings.bf16_flops / ceilings.workers / 1e9
    report.add(
        f"execution on the kept blocks, short rows left out, {_place(rows)}",
        f">= {EXECUTION_GFLOPS:g} GFLOP/s a core",
        f"{rate:.0f} (torch SDPA {dense:.0f}; bf16 matrix product {ceiling:.0f})",
        rate >= EXECUTION_GFLOPS,
        ceilings=asdict(ceilings),
    )


def _place(rows: Sequence[Row]) -> str:
    return f"{rows[0].tokens} tokens, stride {rows[0].setting.stride}"


def check_error(report: Report, plan: Plan) -> None:
    """L1 error against dense attention in float32, beside that of the torch reference."""
    found: list[dict[str, Any]] = []
    work = prefixes(plan, [plan.full])
    with tqdm(total=len(work) * len(STRIDES), desc="errors, with the torch reference", unit="run") as bar:
        for trace, _ in work:
            inputs = trace.prefix(plan.full)
            with torch.inference_mode():
                exact = exact_dense(inputs)
            for stride in STRIDES:
                setting = Setting(plan.backend, stride, DEFAULT_TAU, plan.dense_rows)
                reference = Setting("reference", stride, DEFAULT_TAU, sale_config(inputs, setting).dense_rows)
                errors = {one.backend: error_of(inputs, one, exact) for one in (setting, reference)}
                ratio = errors[plan.backend] / errors["reference"]
                found.append({"trace": trace.name, "stride": stride, "errors": errors, "ratio": ratio})
                bar.update()
    worst = max(found, key=lambda entry: entry["ratio"])
    report.add(
        f"L1 error against dense over the torch reference's, {plan.full} tokens, worst of all",
        f"<= {ERROR_RATIO}x",
        f"{worst['ratio']:.4f}x ({worst['errors'][plan.backend]:.4f}, {worst['trace']}, stride {worst['stride']})",
        worst["ratio"] <= ERROR_RATIO,
        runs=found,
    )


@torch.inference_mode()
def error_of(trace: Trace, setting: Setting, exact: torch.Tensor) -> float:
    """L1 error of one run against `exact`."""
    output, counts = sale_call(trace, setting)()
    assert counts is not None
    require_sparse(counts, setting)
    return l1_error(output, exact)


def sale_arguments(plan: Plan) -> list[str]:
    """Of a server that runs SALE at default settings."""
    return ["--attention", "sale", "--attention-backend", plan.backend]


def dense_servers(tokens: int) -> dict[str, list[str]]:
    """Of servers that run dense: in the engine's chunks, and a prompt of `tokens` in one causal SDPA a layer."""
    whole = -(-tokens // 128) * 128
    return {
        "dense in default chunks": ["--attention", "dense"],
        "dense in one piece": ["--attention", "dense", "--chunk-tokens", str(whole)],
    }


def check_served(report: Report, plan: Plan) -> None:
    """The default model through gRPC: time to the first token, the answer, the report."""
    with serving_each({"SALE": sale_arguments(plan), **dense_servers(plan.served)}) as servers:
        tokenizer = servers["SALE"].client.tokenizer()
        prompt = question_prompt(plan.served, tokenizer, PASSWORD, DOCUMENT_OFFSET)
        runs = alternate(servers, prompt, SERVED_ROUNDS)
    medians = {name: statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    add_first_token(report, f"{DEFAULT_MODEL} through gRPC, {len(prompt)} tokens", medians, SERVED_SPEEDUP, runs)
    answers = {name: {run.answer_ids for run in taken} for name, taken in runs.items()}
    distinct = set().union(*answers.values())
    texts = sorted({tokenizer.decode(ids) for ids in distinct})
    report.add(
        "... greedy answer to a planted question, SALE and dense",
        "right and the same",
        " | ".join(texts)[:90],
        len(distinct) == 1 and PASSWORD.answer in texts[0],
        answers={name: [tokenizer.decode(ids) for ids in found] for name, found in answers.items()},
    )
    worst = max(run.unreported_share for taken in runs.values() for run in taken)
    report.add(
        "... the report's phases add up to the caller's wall time, worst run",
        f"within {UNREPORTED_SHARE:.0%}",
        f"{worst:.2%} apart",
        worst <= UNREPORTED_SHARE,
    )


def alternate(servers: dict[str, ServedModel], prompt: list[int], rounds: int) -> dict[str, list[FirstToken]]:
    """Asks each server once a round, one at a time, a different one first in each round."""
    names = list(servers)
    runs: dict[str, list[FirstToken]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(announced(name, servers[name], prompt, ANSWER_TOKENS))
    return runs


def announced(name: str, served: ServedModel, prompt: list[int], answer_tokens: int = 1) -> FirstToken:
    """`first_token`, with a line before and after: these take from seconds to minutes."""
    print(f"     {name}, {len(prompt)} tokens ...", end=" ", flush=True)
    run = first_token(served, prompt, answer_tokens=answer_tokens)
    stats = run.stats
    print(
        f"{run.seconds:.1f} s to the first token (estimation {stats.estimation_seconds:.1f}, attention "
        f"{stats.attention_seconds:.1f}, other {stats.other_seconds:.1f}; density {stats.density:.3f})",
        flush=True,
    )
    return run


def add_first_token(
    report: Report, what: str, seconds: dict[str, float], least: float, runs: dict[str, list[FirstToken]]
) -> None:
    """The line of SALE against the faster dense server."""
    dense = {name: value for name, value in seconds.items() if name != "SALE"}
    fastest = min(dense, key=lambda name: dense[name])
    speedup = dense[fastest] / seconds["SALE"]
    others = ", ".join(f"{name} {value:.1f} s" for name, value in dense.items())
    report.add(
        f"{what}: time to the first token",
        f">= {least:g}x over dense",
        f"{speedup:.2f}x over {fastest}: SALE {seconds['SALE']:.1f} s, {others}",
        speedup >= least,
        runs={name: [_run_details(run) for run in taken] for name, taken in runs.items()},
    )


def _run_details(run: FirstToken) -> dict[str, Any]:
    stats = run.stats
    return {
        "first_token_seconds": run.seconds,
        "prefill_seconds": run.prefill_seconds,
        "queue_seconds": stats.queue_seconds,
        "estimation_seconds": stats.estimation_seconds,
        "attention_seconds": stats.attention_seconds,
        "other_seconds": stats.other_seconds,
        "density": stats.density,
        "attention_backend": stats.attention_backend,
    }


def check_long(report: Report, plan: Plan) -> None:
    """Past the model's own context, with YaRN: time to the first token and peak memory."""
    lengths = [plan.long // 4, plan.long // 2, plan.long]
    with tempfile.TemporaryDirectory(prefix="sale-prefill-yarn-") as folder:
        model = ["--model", str(yarn_copy(resolve_model(DEFAULT_MODEL).path, Path(folder), YARN_FACTOR))]
        with serving(*model, *sale_arguments(plan)) as served:
            tokens = english_reference(plan.long, served.client.tokenizer())
            growth, run = peak_growth(served, tokens, lengths)
        runs = {"SALE": [run]}
        for name, arguments in dense_servers(plan.long).items():
            with serving(*model, *arguments) as served:
                runs[name] = [announced(name, served, tokens)]
    seconds = {name: taken[0].seconds for name, taken in runs.items()}
    what = f"{DEFAULT_MODEL}, YaRN x{YARN_FACTOR:g}, through gRPC, {plan.long} tokens"
    add_first_token(report, what, seconds, LONG_SPEEDUP, runs)
    for longer in lengths[1:]:
        add_growth(report, growth, lengths[0], longer)


def yarn_copy(source: Path, folder: Path, factor: float) -> Path:
    """A copy of a model directory whose rotary embedding is stretched by YaRN, and its context with it."""
    target = folder / source.name
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    context = config["max_position_embeddings"]
    stretched = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    config["rope_parameters"] = {**config["rope_parameters"], **stretched}
    config["max_position_embeddings"] = int(context * factor)
    file.write_text(json.dumps(config, indent=2))
    return target


def peak_growth(served: ServedModel, tokens: list[int], lengths: Sequence[int]) -> tuple[dict[int, int], FirstToken]:
    """By length, how far the server's peak lies above what it held before the first; and the run of the last length."""
    before = served.memory_bytes("VmRSS")
    served.forget_peak()
    growth = {}
    for length in lengths:
        run = announced("SALE", served, tokens[:length])
        growth[length] = served.memory_bytes("VmHWM") - before
    return growth, run


def add_growth(report: Report, growth: dict[int, int], shorter: int, longer: int) -> None:
    """The line of two lengths' peak memory."""
    linear, measured = longer / shorter, growth[longer] / growth[shorter]
    report.add(
        f"... growth of the server's peak memory, {longer} over {shorter} tokens",
        f"<= {MEMORY_RATIO * linear:.2f} (linear: {linear:g})",
        f"{measured:.2f} ({growth[longer] / 2**20:.0f} over {growth[shorter] / 2**20:.0f} MiB)",
        measured <= MEMORY_RATIO * linear,
        growth_bytes=growth,
    )


def check_kit(report: Report, plan: Plan) -> None:
    """The conformance kit on every instruction set that the backend has here, each forced."""
    try:
        isas = available_isas()
    except KernelBuildError as error:
        isas = ()
        print(f"     no native kernels: {error}", flush=True)
    for path, prefix in REQUIRED_PATHS.items():
        if not any(isa.startswith(prefix) for isa in isas):
            report.add(f"conformance kit, {path} path", "passes", "this path is not available here", False)
    for isa in isas:
        print(f"     conformance kit on {isa} ...", flush=True)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/conformance", "-k", kit_filter(isa, isas)],
            cwd=ROOT,
            env={**os.environ, ISA_VARIABLE: isa},
            capture_output=True,
            text=True,
        )
        summary = last_line(run.stdout)
        passed = run.returncode == 0 and " passed" in summary
        report.add(f"conformance kit, instruction set {isa} forced", "passes", summary, passed)


def kit_filter(isa: str, isas: Sequence[str]) -> str:
    """pytest's -k for the tests of one instruction set; names of others may begin with its own."""
    return " and ".join(
        [f"cpu-{isa}", *(f"not cpu-{other}" for other in isas if other != isa and other.startswith(isa))]
    )


def check_sanitizers(report: Report, plan: Plan) -> None:
    """ASan and UBSan on the kit."""
    print("     make check-sanitize ...", flush=True)
    run = subprocess.run(
        # Our own ARGS would reach this make through its environment.
        ["make", "--no-print-directory", "check-sanitize", "ARGS="],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    findings = len(_SANITIZER_FINDING.findall(run.stdout))
    report.add(
        "conformance kit under ASan and UBSan",
        "exit 0, no finding",
        f"exit {run.returncode}, {findings} findings: {last_line(run.stdout)}",
        run.returncode == 0 and not findings,
        output="" if run.returncode == 0 else run.stdout[-_SANITIZER_OUTPUT:],
    )


def last_line(output: str) -> str:
    """What pytest or make said last."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return lines[-1] if lines else "no output"


CHECKS: dict[str, Callable[[Report, Plan], None]] = {
    "speed": check_speed,
    "error": check_error,
    "served": check_served,
    "long": check_long,
    "kit": check_kit,
    "sanitizers": check_sanitizers,
}


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Plan, list[str] | None]:
    """Command line: what to measure, and which checks, None for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks only")
    parser.add_argument("--backend", default=Plan.backend, help="attention backend (default: %(default)s)")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="as for benchmarks.attention")
    parser.add_argument("--rounds", type=int, help="runs of each on the traces (default: what fits half a minute)")
    parser.add_argument("--dense-rows", type=int, default=0, help="first sparse row; 0 measures, as the server does")
    for name, what in (("full", "of the traces"), ("middle", "of the traces' beginning")):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name), help=f"tokens {what}")
    parser.add_argument("--short", type=int, nargs="+", default=Plan.short, help="tokens where SALE must not be slower")
    parser.add_argument("--served", type=int, default=Plan.served, help="tokens of the prompt through gRPC")
    parser.add_argument("--long", type=int, default=Plan.long, help="tokens of the prompt with YaRN")
    options = vars(parser.parse_args(arguments))
    only = options.pop("only")
    return Plan(**{**options, "short": tuple(options["short"])}), only


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks. Returns an exit status."""
    plan, only = parse_arguments(arguments)
    if plan.backend not in available_backends():
        print(f"no attention backend {plan.backend!r} here; there are {', '.join(available_backends())}")
        return 1
    if torch.get_num_threads() != THREADS or not set(NEEDED_FEATURES) <= set(cpu_features()):
        print(
            f"the promises are for {THREADS} threads with {' and '.join(NEEDED_FEATURES)}; this machine has "
            f"{torch.get_num_threads()}, and {', '.join(cpu_features()) or 'none that is known'}"
        )
    warn_if_busy()
    print(f"backend {describe_backend(plan.backend)}")
    as_promised = only is None and plan == Plan(traces=plan.traces)
    report = Report("attention" if as_promised else "attention-partial")
    for name in only or CHECKS:
        CHECKS[name](report, plan)
    return report.finish("make check-attention")


if __name__ == "__main__":
    sys.exit(main())
