"""What attention on a GPU promises, measured: `make check-gpu`.

    python -m benchmarks.check_gpu [--only selection traces ...] [--traces DIR] [--prototypes DIR] [--commit HASH]

Prints every line with required, aim and measured. A whole run is written to `benchmarks/results/gpu-h100.json`, some
parts of it to `gpu-h100-partial.json`, which git ignores. Needs an H100 with 80 GB, and beside what `make setup`
installs: `pip install fa3-fwd==0.0.3` (FlashAttention-3), compute-sanitizer of the CUDA toolkit on PATH, and traces of
32K tokens, one of layer 13 (`benchmarks/attention_traces.py` says where). What is missing makes its lines
fail. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import gpu_decode, gpu_kernels, gpu_service
from benchmarks.attention_traces import TRACES_VARIABLE, locate_traces
from benchmarks.gpu_rows import Row, at_least, at_most, information, print_rows, write_rows
from benchmarks.report import ROOT
from sale_attention.jit import CACHE_VARIABLE, kernel_cache_dir

RESULTS = ROOT / "benchmarks" / "results" / "gpu-h100.json"
#: What a whole run has; prototypes only where a folder of them is named.
PARTS = (
    *("build", "selection", "execution", "traces", "long", "short", "decode", "errors", "correctness", "engine"),
    *("service", "prototypes"),
)
KIT = "tests/conformance/test_conformance.py"
GPU_TESTS = [
    "tests/unit/attention/test_attention_cuda.py",
    "tests/unit/attention/test_attention_decode.py",
    "tests/unit/server/test_decode.py",
]
BUILD = "from sale_attention import get_backend; print(get_backend('cuda').description)"


def environment(**changes: str) -> dict[str, str]:
    """This process's, changed."""
    return {**os.environ, **changes}


def found_traces(folder: Path | None) -> list[Path]:
    """The traces, or none with a word about it: lines that need them then fail."""
    try:
        return locate_traces(folder)
    except (SystemExit, OSError, ValueError) as error:
        print(f"     no traces: {error}", flush=True)
        return []


def pytest_row(line: str, arguments: list[str], **changes: str) -> Row:
    """pytest with `arguments`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    passed = done.returncode == 0 and "passed" in last
    if not passed:
        print(done.stdout[-4000:])
    return Row(line, "passes", "", last.strip("= "), passed)


def kit_rows(architecture: str | None) -> list[Row]:
    """The conformance kit on the GPU, natively or through another target's kernels."""
    if architecture is None:
        return [pytest_row("conformance kit", [KIT, "-k", "cuda"])]
    line = f"conformance kit, sm_{architecture} kernels from PTX, s4 included"
    return [pytest_row(line, [KIT, "-k", "cuda"], SALE_PREFILL_CUDA_ARCH=architecture)]


def sanitizer_rows(tool: str) -> list[Row]:
    """memcheck or racecheck over every kernel on small shapes."""
    line = f"compute-sanitizer {tool}, every kernel of this GPU's target, small shapes"
    if shutil.which("compute-sanitizer") is None:
        return [Row(line, "clean", "", "not installed", False)]
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=sale", "--error-exitcode", "3"]
    command += [sys.executable, "-m", "benchmarks.gpu_sanitize"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout)
    measured = summary[-1] if summary else done.stdout[-200:] + done.stderr[-200:]
    clean = done.returncode == 0 and bool(summary)
    if not clean:
        print(done.stdout[-3000:])
    return [Row(line, "clean", "", measured, clean)]


def correctness_rows() -> list[Row]:
    """Whatever is not timed, side by side: the kit, the default model's answers, the sanitizers."""
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(kit_rows, None),
            pool.submit(kit_rows, "80"),
            pool.submit(gpu_service.measure_default_model),
        ]
        jobs += [pool.submit(lambda: [pytest_row("GPU tests of decode, graphs and the library", GPU_TESTS)])]
        jobs += [pool.submit(sanitizer_rows, tool) for tool in ("memcheck", "racecheck")]
        return [row for job in jobs for row in job.result()]


def build_rows() -> list[Row]:
    """The first build, from nothing, with eight compiler processes at a time."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", BUILD],
            env=environment(**{CACHE_VARIABLE: cache}, MAX_JOBS="8"),
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        built = next(Path(cache).rglob("built-in-seconds"), None)
        alone = built.read_text().strip() if built else "?"
        if built:  # the other parts need it, too
            shutil.copytree(built.parent, kernel_cache_dir() / built.parent.name, dirs_exist_ok=True)
    row = at_most("first JIT build, 8 compilers, imports included", 120, 60, seconds, " s", build_seconds=alone)
    return [row if done.stdout.startswith("cuda-") else Row(row.line, row.required, row.aim, done.stderr[-300:], False)]


def decode_rows() -> list[Row]:
    """Decode attention's share of the memory's bandwidth."""
    copy = gpu_decode.copy_rate()
    rows = [information("memory: a copy, bytes read and written", f"{copy:.0f} GB/s")]
    for case in gpu_decode.CASES:
        milliseconds, rate = gpu_decode.time_case(case)
        share = 100 * rate / gpu_decode.PEAK_GIGABYTES_A_SECOND
        if case.name == "16 x 64K":
            line = f"decode, 1 query, 64K KV, 16 sessions, share of {gpu_decode.PEAK_GIGABYTES_A_SECOND:.0f} GB/s"
            rows.append(at_least(line, 70, 85, share, " %", milliseconds=milliseconds, of_copy=rate / copy))
        else:
            rows.append(
                information(f"... decode {case.name}", f"{milliseconds:.3f} ms, {rate:.0f} GB/s, {share:.0f} %")
            )
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument("--traces", type=Path, help=f"folder of traces; default ${TRACES_VARIABLE}")
    parser.add_argument("--prototypes", type=Path, help="folder with the Triton prototypes, to be timed beside")
    parser.add_argument(
        "--service-rounds", type=int, default=1, help="measurements of each prompt of the 8B-shaped model"
    )
    parser.add_argument("--service-strides", nargs="+", type=int, default=[4, 2], help="query strides of it")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to ask")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "make check-gpu needs an NVIDIA H100, and torch finds no CUDA device here; without: make check-kernels"
        )
    partial = RESULTS.with_name("gpu-h100-partial.json")
    traces = found_traces(arguments.traces)
    layer13 = next((file for file in traces if "layer13" in file.stem), None)
    parts: dict[str, Callable[[], list[Row]]] = {
        "build": build_rows,
        "selection": gpu_kernels.selection_rows,
        "execution": gpu_kernels.execution_rows,
        "traces": lambda: gpu_kernels.trace_rows(traces),
        "long": gpu_kernels.long_rows,
        "short": lambda: gpu_kernels.short_rows(layer13),
        "decode": decode_rows,
        "errors": lambda: gpu_kernels.error_rows(traces),
        "correctness": correctness_rows,
        "engine": gpu_service.measure_engine_decode,
        "service": lambda: gpu_service.measure_large_model(
            gpu_service.LENGTHS,
            strides=arguments.service_strides,
            rounds=arguments.service_rounds,
            traces=arguments.traces,
        ),
    }
    if arguments.prototypes:
        parts["prototypes"] = lambda: gpu_kernels.prototype_rows(arguments.prototypes)
    command = " ".join(["python -m benchmarks.check_gpu", *sys.argv[1:]])
    rows: list[Row] = []
    for name in arguments.only or parts:
        started = time.perf_counter()
        try:
            rows += parts[name]()
        except (Exception, SystemExit):  # the other lines are worth having
            traceback.print_exc()
            rows.append(Row(name, "runs", "", "failed: see the traceback", False))
        torch.cuda.empty_cache()
        print(f"     {name} took {time.perf_counter() - started:.0f} s", flush=True)
        write_rows(arguments.json or partial, rows, command, arguments.commit)  # a run cut short leaves what it has
    if arguments.only is None and arguments.json is None:
        partial.replace(RESULTS)
    print_rows(rows)
    required = [row for row in rows if row.required]
    print(f"\n{sum(row.passed for row in required)} of {len(required)} lines hold")
    return 0 if all(row.passed for row in required) else 1


if __name__ == "__main__":
    sys.exit(main())
