"""SALE's selection beside other methods': error of attention outputs at equal density and at equal cost, on real
traces.

    python -m benchmarks.fidelity_peers [--traces FOLDER] [--device cuda] [--tokens N] [--blocks N] [--json FILE]
                                        [--plot FILE]

Every method (`sale_fidelity.peers`) estimates each head of each trace once; its knob is then solved

- by head: each head has the density asked for;
- shared: one knob for the heads of a trace, whose mean density is the one asked for;
- own: the same, at the density that SALE has on that trace at its default threshold;
- by cost: each head costs as much, what it keeps and the estimation together, in shares of dense attention.

Errors are |o - o_dense| / |o_dense| by row, float32 under exact masks, over the rows of sampled query blocks in the
last three quarters of the prompt. Where a method has settings that its paper searches offline by head, each head gets
the one with the least p99 error on the very rows it is judged by, which no search can better.

The four 32K traces with 48 blocks a head: 48 seconds on an H100, about 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.attention_plot import WITHOUT_MATPLOTLIB, can_plot
from benchmarks.attention_traces import Trace, load_trace, locate_traces
from benchmarks.gpu_rows import Row, information, print_rows, write_rows
from sale_attention import DEFAULT_TAU, SaleConfig
from sale_fidelity.peers import SALE, SALE_PAPER, Head, Levels, Method, Sale, methods, solve_shared
from sale_fidelity.peers.errors import BlockSample, ErrorSummary, sampled_blocks

#: Kept shares at which methods are compared.
DENSITIES = (0.05, 0.1, 0.2, 0.3)
#: Total costs, in shares of dense attention, at which methods are compared.
COSTS = (0.2, 0.3, 0.4, 0.5)
BLOCKS = 48
#: A setting counts as having reached a density if it misses it by no more than this.
TOLERANCE = 0.01
_TRACES_TO_WIN = 0.75

Solved = Literal["head", "shared", "own", "cost"]


@dataclass(frozen=True, eq=False)
class Point:
    """One method at one target on one trace, or over all of them.

    Attributes:
        method: its name.
        solved: how the knob was.
        target: density, or cost, asked for.
        trace: the trace's name.
        density: reached, mean over heads.
        cost: what is kept and the estimation, as shares of dense attention, mean over heads.
        settings: by head, where the method has several.
        errors: of all rows of all heads, float32 on the CPU.
    """

    method: str
    solved: Solved
    target: float
    trace: str
    density: float
    cost: float
    settings: tuple[str, ...]
    errors: Tensor

    def summary(self) -> dict[str, Any]:
        """For other programs."""
        found = {field: getattr(self, field) for field in ("method", "solved", "target", "trace", "density", "cost")}
        return found | {
            "settings": list(self.settings),
            "rows": len(self.errors),
            **asdict(ErrorSummary.of(self.errors)),
        }


@dataclass(frozen=True, eq=False)
class _Choice:
    """What one rule does to one head at one knob."""

    setting: str
    density: float
    errors: Tensor

    @property
    def p99(self) -> float:
        return ErrorSummary.of(self.errors).p99


class _MeasuredHead:
    """One head of a trace: its sampled blocks, and each method's estimates."""

    def __init__(self, trace: Trace, index: int, blocks: int, compared: Sequence[Method]) -> None:
        first_row = trace.tokens // 4 // 128 * 128
        self.head = Head(trace.query[0, index], trace.keys[0, 0], trace.scale, first_row)
        self.levels = {method.name: [rule.levels(self.head) for rule in method.rules] for method in compared}
        self._sampled = sampled_blocks(next(iter(self.levels.values()))[0].query_blocks, blocks)
        self._values = trace.values[0, 0].to(torch.float32)

    def samples(self) -> list[BlockSample]:
        """Scores and dense outputs of the sampled blocks: 5 MiB a block at 32K."""
        return [BlockSample.of(self.head, self._values, index) for index in self._sampled]

    def choose(self, method: Method, samples: Sequence[BlockSample], density: float) -> _Choice:
        """The setting with the least p99 error among those that reach `density`."""
        levels = self.levels[method.name]
        knobs = [one.solve(density) for one in levels]
        reached = [one.density(knob) for one, knob in zip(levels, knobs, strict=True)]
        nearest = min(abs(share - density) for share in reached)
        choices = [
            _Choice(rule.setting, share, _errors(samples, one, knob))
            for rule, one, knob, share in zip(method.rules, levels, knobs, reached, strict=True)
            if abs(share - density) <= max(TOLERANCE, nearest)
        ]
        return min(choices, key=lambda choice: choice.p99)


def _errors(samples: Iterable[BlockSample], levels: Levels, knob: float) -> Tensor:
    return torch.cat([sample.row_errors(levels, knob) for sample in samples]).cpu()


@torch.inference_mode()
def measure_trace(
    trace: Trace,
    *,
    blocks: int = BLOCKS,
    densities: Sequence[float] = DENSITIES,
    costs: Sequence[float] = COSTS,
    compared: Sequence[Method] | None = None,
    on_head: Callable[[int, int], object] = lambda done, total: None,
) -> list[Point]:
    """Every method at every target on one trace.

    Args:
        trace: on the device to compute on.
        blocks: sampled query blocks a head.
        densities: targets, by head and shared.
        costs: targets.
        compared: the methods; None for all.
        on_head: told how many heads of how many are done.
    """
    compared = methods() if compared is None else compared
    heads = [_MeasuredHead(trace, index, blocks, compared) for index in range(trace.heads)]
    samples = [head.samples() for head in heads]
    own = _own_density(heads, compared)
    choices: dict[tuple[str, Solved, float], list[_Choice]] = {}
    for done, head in enumerate(heads, 1):
        for method in compared:
            targets: list[tuple[Solved, float, float]] = [("head", density, density) for density in densities]
            targets += [("own", DEFAULT_TAU, own)] if own is not None else []
            targets += [("cost", cost, cost - _estimation(method, trace)) for cost in costs]
            for solved, target, density in targets:
                if density > 0:
                    choice = head.choose(method, samples[done - 1], density)
                    choices.setdefault((method.name, solved, target), []).append(choice)
        on_head(done, len(heads))
    together: list[tuple[Solved, Solved, float, float]] = [("head", "shared", share, share) for share in densities]
    together += [("own", "own", DEFAULT_TAU, own)] if own is not None else []
    for method in compared:
        for apart, solved, target, density in together:
            places = [_place_of(method, choice.setting) for choice in choices[method.name, apart, target]]
            levels = [head.levels[method.name][place] for head, place in zip(heads, places, strict=True)]
            knob = solve_shared([one.curve for one in levels], density)
            choices[method.name, solved, target] = [
                _Choice(method.rules[place].setting, one.density(knob), _errors(sampled, one, knob))
                for place, one, sampled in zip(places, levels, samples, strict=True)
            ]
    by_name = {method.name: method for method in compared}
    return [_point(trace, by_name[name], solved, target, chosen) for (name, solved, target), chosen in choices.items()]


def _own_density(heads: Sequence[_MeasuredHead], compared: Sequence[Method]) -> float | None:
    """Mean density of SALE, every row inspected, at its default threshold; None where it is not compared."""
    name = next((method.name for method in compared if method.family == SALE), None)
    if name is None:
        return None
    return sum(head.levels[name][0].density(-math.log(DEFAULT_TAU)) for head in heads) / len(heads)


def _place_of(method: Method, setting: str) -> int:
    return [rule.setting for rule in method.rules].index(setting)


def _estimation(method: Method, trace: Trace) -> float:
    return method.rules[0].cost(trace.tokens, trace.head_dim).share(trace.tokens, trace.head_dim)


def _point(trace: Trace, method: Method, solved: Solved, target: float, chosen: Sequence[_Choice]) -> Point:
    density = sum(choice.density for choice in chosen) / len(chosen)
    settings = tuple(choice.setting for choice in chosen) if len(method.rules) > 1 else ()
    errors = torch.cat([choice.errors for choice in chosen])
    return Point(
        method.name, solved, target, trace.name, density, density + _estimation(method, trace), settings, errors
    )


def pooled(points: Sequence[Point]) -> list[Point]:
    """By method and target, the rows of all traces together; densities and costs are means over traces."""
    groups: dict[tuple[str, Solved, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.solved, point.target), []).append(point)
    return [
        Point(
            method,
            solved,
            target,
            "pooled",
            sum(point.density for point in group) / len(group),
            sum(point.cost for point in group) / len(group),
            (),
            torch.cat([point.errors for point in group]),
        )
        for (method, solved, target), group in groups.items()
    ]


def peer_rows(
    traces: Sequence[Trace],
    *,
    blocks: int = BLOCKS,
    densities: Sequence[float] = DENSITIES,
    costs: Sequence[float] = COSTS,
    compared: Sequence[Method] | None = None,
    family: str = SALE,
    required: Sequence[Solved] = ("head", "shared", "own"),
    on_head: Callable[[int, int], object] = lambda done, total: None,
) -> list[Row]:
    """The comparison as lines, one for each way to solve the knob and each target.

    Args:
        traces: on the device to compute on.
        blocks: sampled query blocks a head.
        densities: targets.
        costs: targets.
        compared: the methods; None for all.
        family: which of SALE's variants stand against the peers.
        required: the ways of solving whose lines must hold; the others inform.
        on_head: told how many heads of a trace are done.

    Returns:
        The lines. The details of the first hold every point of every trace (`Point.summary`) as "points", which
        `benchmarks.fidelity_peers_plot` draws.
    """
    compared = methods() if compared is None else compared
    points = [
        point
        for trace in traces
        for point in measure_trace(
            trace, blocks=blocks, densities=densities, costs=costs, compared=compared, on_head=on_head
        )
    ]
    points += pooled(points)
    targets: list[tuple[Solved, float]] = [("own", DEFAULT_TAU)] if any(m.family == SALE for m in compared) else []
    targets += [("head", density) for density in densities]
    targets += [("shared", density) for density in densities] + [("cost", cost) for cost in costs]
    rows = [
        _verdict(points, compared, solved, target, family, required=solved in required) for solved, target in targets
    ]
    rows[0].details["points"] = [point.summary() for point in points]
    return rows


_TITLES: dict[Solved, str] = {
    "head": "p99 row error, every head at density {:g}",
    "shared": "p99 row error, one knob a trace, mean density {:g}",
    "own": "p99 row error, one knob a trace, at SALE's density at tau {:g}",
    "cost": "p99 row error, every head at {:.0%} of dense cost",
}


@dataclass(frozen=True)
class _Duel:
    """Ours against the best peer on one trace, by p99."""

    trace: str
    ours: str
    our_errors: ErrorSummary
    rival: str
    rival_errors: ErrorSummary

    @property
    def won(self) -> bool:
        return self.our_errors.p99 < self.rival_errors.p99


def _verdict(
    points: Sequence[Point], compared: Sequence[Method], solved: Solved, target: float, family: str, required: bool
) -> Row:
    """`family` with every row inspected (at equal cost, with its best stride) against the best peer of each trace."""
    ours = [method.name for method in compared if method.family == family]
    ours = ours if solved == "cost" else ours[:1]
    peers = [method.name for method in compared if method.is_peer]
    by_trace: dict[str, dict[str, ErrorSummary]] = {}
    for point in points:
        if point.solved == solved and point.target == target:
            by_trace.setdefault(point.trace, {})[point.method] = ErrorSummary.of(point.errors)
    title = _TITLES[solved].format(target)
    duels = [duel for trace, found in by_trace.items() if (duel := _duel(trace, found, ours, peers)) is not None]
    if not duels:
        return information(title, f"the estimation of {family} alone costs more")
    whole = next(duel for duel in duels if duel.trace == "pooled")
    single = [duel for duel in duels if duel.trace != "pooled"]
    won = [duel.trace for duel in single if duel.won]
    place = ("pooled", whole.ours, solved, target)
    density = next(p.density for p in points if (p.trace, p.method, p.solved, p.target) == place)
    measured = (
        f"{whole.ours} {whole.our_errors.p99:.3f} (max {whole.our_errors.max:.2f}), {whole.rival} "
        f"{whole.rival_errors.p99:.3f} (max {whole.rival_errors.max:.2f}); density {density:.3f}; below on "
        f"{len(won)} of {len(single)} traces"
    )
    details: dict[str, Any] = {"below_pooled": whole.won, "below_on": won}
    for trace, found in by_trace.items():
        details[trace] = {name: asdict(summary) for name, summary in found.items()}
    if not required:
        return information(title, measured, **details)
    passed = whole.won and len(won) >= _TRACES_TO_WIN * len(single)
    return Row(title, "below every peer, pooled and on 3 of 4", "", measured, passed, details)


def _duel(trace: str, found: Mapping[str, ErrorSummary], ours: Sequence[str], peers: Sequence[str]) -> _Duel | None:
    """None where none of ours, or no peer, can be had for so little."""
    mine = min((name for name in ours if name in found), key=lambda name: found[name].p99, default=None)
    rival = min((name for name in peers if name in found), key=lambda name: found[name].p99, default=None)
    if mine is None or rival is None:
        return None
    return _Duel(trace, mine, found[mine], rival, found[rival])


def print_points(points: Sequence[dict[str, Any]], trace: str = "pooled") -> None:
    """The whole table of one trace, from `Point.summary`."""
    print(
        f"\n{trace}\n{'solved':<8}{'target':<8}{'method':<24}{'density':>8}{'cost':>8}{'mean':>9}{'p99':>9}{'max':>9}"
    )
    for point in sorted(
        (one for one in points if one["trace"] == trace), key=lambda one: (one["solved"], one["target"])
    ):
        print(
            f"{point['solved']:<8}{point['target']:<8g}{point['method']:<24}{point['density']:>8.3f}{point['cost']:>8.3f}"
            f"{point['mean']:>9.4f}{point['p99']:>9.4f}{point['max']:>9.3f}"
        )


def load_all(folder: Path | None, tokens: int | None, device: torch.device) -> list[Trace]:
    """The traces to measure on, on `device`, cut to `tokens`."""
    loaded = [load_trace(file) for file in locate_traces(folder)]
    return [trace.prefix(trace.tokens if tokens is None else tokens, device) for trace in loaded]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, help="only the first so many tokens of each trace")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="sampled query blocks a head")
    parser.add_argument("--only", type=int, nargs="+", help="places of the traces to take, from 0")
    parser.add_argument("--family", choices=(SALE, SALE_PAPER), default=SALE, help="which stands against the peers")
    parser.add_argument("--sample-strides", type=int, nargs="+", default=[], help="SALE with other samples, beside")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    traces = load_all(options.traces, options.tokens, torch.device(options.device))
    if options.only:
        traces = [traces[place] for place in options.only]
    started = time.perf_counter()

    def tell(done: int, total: int) -> None:
        print(f"{time.perf_counter() - started:6.0f} s: head {done} of {total}", file=sys.stderr, flush=True)

    others = tuple(
        Method(f"SALE, 1 in {stride}", (Sale(1, SaleConfig(sample_stride=stride)),), "SALE, other samples")
        for stride in options.sample_strides
    )
    compared = (*methods(), *others)
    rows = peer_rows(traces, blocks=options.blocks, compared=compared, family=options.family, on_head=tell)
    points = rows[0].details["points"]
    for trace in (*(trace.name for trace in traces), "pooled"):
        print_points(points, trace)
    print_rows(rows)
    if options.json:
        write_rows(options.json, rows, "python -m benchmarks.fidelity_peers " + " ".join(arguments or sys.argv[1:]))
    if options.plot:
        if not can_plot():
            print(WITHOUT_MATPLOTLIB)
        else:
            from benchmarks.fidelity_peers_plot import plot

            plot(points, options.plot)
    return 0 if all(row.passed for row in rows if row.required) else 1


if __name__ == "__main__":
    sys.exit(main())
