"""Blocks that the paper's calibration and `sale-prefill calibrate --objective rows` keep at the same p99 row error.

    python -m benchmarks.fidelity_calibration [--device cuda] [--json FILE]

Both calibrate the default model on the same documents and are judged on others: mean density, and the p99 of all heads'
row errors |o - o_dense| / |o_dense|, on sampled query blocks. The paper's method has no p99 to ask for, so its own is
taken, and the other's density at it interpolated between budgets a quarter apart. The paper calibrates on one prompt of
key-value retrieval; that is a line of its own, beside its rule applied to all documents: the error that it bounds,
averaged over them.

Documents have 8,192 tokens. On a GPU all of them take part, in a minute; on a CPU three to calibrate on and two to
judge on, in some six minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_rows import Row, at_most, information, print_rows, write_rows
from sale_attention import SaleConfig
from sale_fidelity.agreement import quickest_backend
from sale_fidelity.calibration import levels, paper
from sale_fidelity.calibration.capture import LayerCapture, forward_layers
from sale_fidelity.calibration.measure import Measurement, measure_layer, sampled_blocks
from sale_fidelity.calibration.menu import Menu
from sale_fidelity.calibration.rows import solve_rows
from sale_fidelity.calibration.texts import default_documents
from sale_fidelity.evaluation.documents import default_documents as heldout_documents
from sale_fidelity.evaluation.setting import find_profile
from sale_fidelity.models import FidelityModel, load_model
from sale_prefill_server.models import DEFAULT_MODEL

TOKENS = 8192
BLOCKS = 16
#: Of the paper's density at its p99.
RATIO = 0.85
THETAS = (0.1, 0.2, 0.4)
#: p99 row errors asked for.
BUDGETS = tuple(0.04 * 2 ** (step / 3) for step in range(12))
#: Which of calibration's documents take part on a CPU: key-value retrieval, English, code; and how many others judge.
_CPU_DOCUMENTS, _CPU_HELDOUT = (0, 1, 3), 2
_HELDOUT = 4


@dataclass
class Sums:
    """What was measured of the documents so far, by layer."""

    rows: list[Measurement] = field(default_factory=list)
    paper: list[Measurement] = field(default_factory=list)

    def add(self, layer: int, menu: Menu, measured: Measurement) -> None:
        """One layer of one document under `menu`."""
        sums = self.paper if menu is paper.MENU else self.rows
        if layer == len(sums):
            sums.append(measured)
        else:
            sums[layer] = sums[layer] + measured


@dataclass(frozen=True)
class Point:
    """Settings judged on held-out documents."""

    density: float
    p99_error: float


class Comparison:
    """Two calibrations of one model.

    Args:
        model: the default one.
        say: told of progress.
    """

    def __init__(self, model: FidelityModel, say: Callable[[str], None]) -> None:
        self.model, self.say = model, say
        self.config = SaleConfig()
        # Those of the shipped profile, for both: they come from the same documents.
        self.centres = find_profile(model, "auto").key_centres
        self.calibration, self.heldout = Sums(), Sums()
        #: L1 losses of the paper's thresholds, a tensor `[layers, TAUS, heads]` a document.
        self.losses: list[Tensor] = []

    def measure(self) -> None:
        """Runs all documents."""
        whole = self.model.device.type == "cuda"
        documents = default_documents(self.model, TOKENS, 0)
        for number in range(len(documents)) if whole else _CPU_DOCUMENTS:
            losses: list[Tensor] = []

            def calibrate(capture: LayerCapture, losses: list[Tensor] = losses) -> None:
                centre = self.centres[capture.layer]
                losses.append(paper.paper_losses(capture, centre, self.config, quickest_backend(self.model)))

            self._observe(documents[number].name, documents[number].token_ids, number, self.calibration, calibrate)
            self.losses.append(torch.stack(losses))
        for number, document in enumerate(heldout_documents(self.model, TOKENS, _HELDOUT if whole else _CPU_HELDOUT)):
            self._observe(document.name, document.token_ids, number, self.heldout)

    def _observe(
        self,
        name: str,
        token_ids: Sequence[int],
        number: int,
        sums: Sums,
        also: Callable[[LayerCapture], None] | None = None,
    ) -> None:
        self.say(f"{'judging' if also is None else 'calibrating'} on {name}")
        blocks = sampled_blocks(len(token_ids), self.config, BLOCKS, (0.5 + number * 0.618) % 1.0)

        def observe(capture: LayerCapture) -> None:
            centre = self.centres[capture.layer]
            for menu in (_MENU, paper.MENU) if also is None else (_MENU,):
                sums.add(capture.layer, menu, measure_layer(capture, centre, self.config, menu, blocks))
            if also is not None:
                also(capture)

        forward_layers(self.model, token_ids, observe)

    def paper_point(self, theta: float, documents: int) -> Point:
        """The paper's calibration on the first documents, judged on the others."""
        losses = torch.stack(self.losses[:documents]).mean(dim=0)
        taus = [paper.settled_taus(layer, theta) for layer in losses]
        return _judged(self.heldout.paper, paper.MENU, paper.settings_of(taus))

    def row_points(self) -> list[Point]:
        """Every budget's settings, judged."""
        return [_judged(self.heldout.rows, _MENU, solve_rows(self.calibration.rows, budget)) for budget in BUDGETS]


_MENU = Menu()


def _judged(measured: Sequence[Measurement], menu: Menu, chosen: Sequence[int]) -> Point:
    level = levels.level_of(0.0, chosen, measured, menu, torch.zeros(len(chosen), len(menu.settings)))
    return Point(level.density, level.p99_error)


def density_at(points: Sequence[Point], p99_error: float) -> float:
    """Density at a p99 error between two neighbouring points, linear in its logarithm.

    Raises:
        ValueError: no two points lie around it.
    """
    ordered = sorted(points, key=lambda point: point.p99_error)
    for low, high in itertools.pairwise(ordered):
        if 0 < low.p99_error <= p99_error <= high.p99_error:
            share = math.log(p99_error / low.p99_error) / (math.log(high.p99_error / low.p99_error) or 1.0)
            return low.density + share * (high.density - low.density)
    raise ValueError(f"p99 row error {p99_error:.4f} is outside of what was tried")


def paper_rows(*, device: str = "auto") -> list[Row]:
    """The lines: required of the paper's usual theta, told of smaller ones."""
    compared = Comparison(load_model(DEFAULT_MODEL, device=device), _say)
    compared.measure()
    points, count = compared.row_points(), len(compared.losses)
    curve = [{"budget": budget, **vars(point)} for budget, point in zip(BUDGETS, points, strict=True)]
    rows = []
    for documents, where in ((1, "on its key-value prompt"), (count, f"on the same {count} documents")):
        for theta in reversed(THETAS):
            found = compared.paper_point(theta, documents)
            density = density_at(points, found.p99_error)
            line = f"density at the p99 row error of the paper's calibration {where}, theta {theta:g}"
            shown = f"density {density:.3f} for {found.density:.3f} at p99 {found.p99_error:.3f}"
            details = {"paper": vars(found), "density": density, "budgets": curve, "tokens": TOKENS}
            if theta == paper.THETA:
                row = at_most(line, RATIO, None, density / found.density, "x", **details)
                rows.append(Row(row.line, row.required, row.aim, f"{row.measured}; {shown}", row.passed, row.details))
            else:
                rows.append(information(line, f"{density / found.density:.3f}x; {shown}", **details))
    return rows


def _say(line: str) -> None:
    print(f"     {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(arguments)
    rows = paper_rows(device=options.device)
    print_rows(rows)
    if options.json:
        write_rows(options.json, rows, "python -m benchmarks.fidelity_calibration")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
