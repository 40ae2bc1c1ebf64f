"""Attention on real traces: SALE by backend, length and stride against dense SDPA, timed in turns in one run.

    python -m benchmarks.attention [--backends cpu] [--lengths 8192 32768] [--strides 1 2] [--traces FOLDER]

Prints a table by trace and one of medians over the traces with the floor beside each figure (work over what this
machine was measured to do), and writes both with commit, device and versions to benchmarks/results/, and a plot to
docs/figures/. Without `--traces` or $SALE_PREFILL_TRACES it takes the project's own, or captures the default model's.
`--redraw FILE` prints and plots an earlier run's results. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.attention_floor import measure_ceilings
from benchmarks.attention_measure import DenseBaseline, Row, Setting, measure
from benchmarks.attention_plot import WITHOUT_MATPLOTLIB, can_plot, plot
from benchmarks.attention_table import summarise, summary_table, trace_table
from benchmarks.attention_traces import load_trace, locate_traces, slug
from benchmarks.report import ROOT, provenance, warn_if_busy
from sale_attention import DEFAULT_TAU, available_backends
from sale_prefill_server.engine.model import choose_device

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
#: Backends that are no candidates for speed; the reference runs where there is no other.
_SLOW_BACKENDS = ("reference", "dense")


def default_backends() -> list[str]:
    """Backends that are meant to be fast, or the reference where there is none."""
    return [name for name in available_backends() if name not in _SLOW_BACKENDS] or ["reference"]


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's model, as a part of a file name."""
    return "cpu" if device.type == "cpu" else slug(torch.cuda.get_device_name(device))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures. Returns what is written as JSON."""
    warn_if_busy()
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    files = locate_traces(options.traces)
    settings = [
        Setting(backend, stride, options.tau, options.dense_rows)
        for backend in options.backends
        for stride in options.strides
    ]
    ceilings, baseline = measure_ceilings(device), DenseBaseline()
    rows: list[Row] = []
    with tqdm(total=len(files) * len(options.lengths), desc="attention", unit="cell") as bar:
        for file in files:
            trace = load_trace(file)
            for tokens in options.lengths:
                if tokens > trace.tokens:
                    bar.write(f"{trace.name} has {trace.tokens} tokens: no {tokens}", file=sys.stderr)
                else:
                    bar.set_description(f"{trace.name}, {tokens} tokens")
                    rows += measure(
                        trace.prefix(tokens, device),
                        settings,
                        ceilings,
                        baseline,
                        rounds=options.rounds,
                        on_round=lambda done, total: bar.set_postfix_str(f"round {done} of {total}"),
                    )
                bar.update()
    if not rows:
        raise SystemExit(f"nothing measured: no trace is {min(options.lengths)} tokens long")
    table = [asdict(row) for row in rows]
    return {
        **provenance(options.command),
        "measured_on": device_name(device),
        "ceilings": asdict(ceilings),
        "dense_variants": baseline.found,
        "summary": summarise(table),
        "rows": table,
    }


def show(results: dict[str, Any]) -> None:
    """Prints the tables."""
    print(f"\n{trace_table(results['rows'])}\n\n{summary_table(results['summary'], results['ceilings'])}")
    for found in results["dense_variants"]:
        seconds = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in found["seconds"].items())
        print(f"dense at {found['tokens']} tokens, ms: {seconds}")


def draw(results: dict[str, Any], file: Path | None) -> None:
    """Plots, or says why not."""
    if file is None:
        return
    if not can_plot():
        print(WITHOUT_MATPLOTLIB, file=sys.stderr)
        return
    device = results["device"]
    machine = device.get("gpu") if results["measured_on"] != "cpu" else f"{device['cpu']}, threads: {device['threads']}"
    models = ", ".join(sorted({row["model"] for row in results["rows"]}))
    plot(results["summary"], f"Attention of {models}\n{machine}; medians over the traces", file)
    print(f"plotted to {file}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="folder of traces (*.safetensors)")
    parser.add_argument(
        "--backends", nargs="+", choices=available_backends(), default=default_backends(), help="default: %(default)s"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens (default: %(default)s)")
    parser.add_argument("--strides", type=int, nargs="+", choices=(1, 2, 4), default=(1, 2), help="default: 1 2")
    parser.add_argument("--tau", type=float, default=DEFAULT_TAU, help="threshold (default: %(default)s)")
    parser.add_argument("--dense-rows", type=int, default=0, help="first sparse row; 0 measures, as the server does")
    parser.add_argument("--rounds", type=int, help="runs of each (default: what fits half a minute)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/attention-<device>.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: docs/figures/attention-<device>.svg")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="show and plot this earlier result instead")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "benchmarks.attention", *given])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures or redraws. Returns an exit status."""
    options = parse_arguments(arguments)
    if not options.no_plot and not can_plot():
        print(WITHOUT_MATPLOTLIB, file=sys.stderr)  # now, not after the minutes that measuring takes
    results = json.loads(options.redraw.read_text()) if options.redraw else run(options)
    show(results)
    name = f"attention-{results['measured_on']}"
    if not options.redraw:
        file = options.out or ROOT / "benchmarks" / "results" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {file}")
    draw(results, None if options.no_plot else options.plot or ROOT / "docs" / "figures" / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
