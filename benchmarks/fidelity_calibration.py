"""Blocks that the paper's calibration and `sale-prefill calibrate --objective rows` keep at the same p99 row error.

    python -m benchmarks.fidelity_calibration [--device cuda] [--json FILE]

Both calibrate the default model on the same documents and are judged on others: mean density, and the p99 of all heads'
row errors |o - o_dense| / |o_dense|, on sampled query blocks. The paper's method has no p99 to ask for, so its own is
taken, and the other's density at it interpolated between neighbouring budgets. The paper's rule is applied to the mean,
over these documents, of the error that it bounds; and, as published, to one prompt of key-value retrieval.

Documents have 8,192 tokens; with half of that both keep more and differ less. On a GPU six calibrate and four judge, on
a CPU two and two, a piece of English and a module each: six minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_rows import Row, at_most, information, print_rows, write_rows
from sale_attention import SaleConfig
from sale_fidelity.agreement import quickest_backend
from sale_fidelity.calibration import levels, paper
from sale_fidelity.calibration.capture import LayerCapture, forward_layers
from sale_fidelity.calibration.measure import Measurement, measure_layer, sampled_blocks
from sale_fidelity.calibration.menu import SAMPLE_STRIDE, Menu
from sale_fidelity.calibration.rows import solve_rows
from sale_fidelity.calibration.texts import Document, default_documents
from sale_fidelity.evaluation.documents import EvaluationDocument
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
#: Which of calibration's and of evaluation's documents take part: the first English and code on a CPU, all on a GPU.
#: Those that the objective was chosen with do not judge.
_CALIBRATION, _HELDOUT, _ON_CPU = (1, 3, 2, 4, 5, 6), (4, 5, 2, 8), 2
_MENU = Menu()


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
        self.config, self.paper_config = SaleConfig(sample_stride=SAMPLE_STRIDE), SaleConfig()
        # Those of the shipped profile, for both: they come from the same documents.
        self.centres = find_profile(model, "auto").key_centres
        #: By layer: settings of `_MENU` on calibration's documents, those and the paper's on others.
        self.calibration: dict[int, Measurement] = {}
        self.heldout: dict[int, Measurement] = {}
        self.heldout_paper: dict[int, Measurement] = {}
        #: The paper's losses `[layers, TAUS, heads]` of each document, key-value retrieval first.
        self.losses: list[Tensor] = []

    def measure(self) -> None:
        """Runs all documents."""
        count = len(_CALIBRATION) if self.model.device.type == "cuda" else _ON_CPU
        texts, others = default_documents(self.model, TOKENS, 0), heldout_documents(self.model, TOKENS)
        self._calibrate(texts[0], None)
        for number in _CALIBRATION[:count]:
            self._calibrate(texts[number], sampled_blocks(TOKENS, self.config, BLOCKS, (0.5 + number * 0.618) % 1.0))
        for number in _HELDOUT[:count]:
            self._judge(others[number], sampled_blocks(TOKENS, self.config, BLOCKS, 0.3))

    def _calibrate(self, document: Document, blocks: Sequence[int] | None) -> None:
        """Measures both methods' errors on one document; the paper's alone where there are no `blocks`."""
        self.say(f"calibrating on {document.name}")
        losses: list[Tensor] = []

        def observe(capture: LayerCapture) -> None:
            centre = self.centres[capture.layer]
            losses.append(paper.paper_losses(capture, centre, self.paper_config, quickest_backend(self.model)))
            if blocks is not None:
                _add(self.calibration, capture.layer, measure_layer(capture, centre, self.config, _MENU, blocks))

        forward_layers(self.model, document.token_ids, observe)
        self.losses.append(torch.stack(losses))

    def _judge(self, document: EvaluationDocument, blocks: Sequence[int]) -> None:
        """Measures both methods' settings on one document."""
        self.say(f"judging on {document.name}")

        def observe(capture: LayerCapture) -> None:
            centre = self.centres[capture.layer]
            for sums, menu, config in (
                (self.heldout, _MENU, self.config),
                (self.heldout_paper, paper.MENU, self.paper_config),
            ):
                _add(sums, capture.layer, measure_layer(capture, centre, config, menu, blocks))

        forward_layers(self.model, document.token_ids, observe)

    def paper_point(self, theta: float, documents: slice) -> Point:
        """The paper's calibration on some of the documents, judged on the others."""
        losses = torch.stack(self.losses[documents]).mean(dim=0)
        taus = [paper.settled_taus(layer, theta) for layer in losses]
        return _judged(self.heldout_paper, paper.MENU, paper.settings_of(taus))

    def row_points(self) -> list[Point]:
        """Every budget's settings, judged."""
        measured = list(self.calibration.values())
        return [_judged(self.heldout, _MENU, solve_rows(measured, budget)) for budget in BUDGETS]


def _add(sums: dict[int, Measurement], layer: int, measured: Measurement) -> None:
    sums[layer] = sums[layer] + measured if layer in sums else measured


def _judged(measured: Mapping[int, Measurement], menu: Menu, chosen: Sequence[int]) -> Point:
    level = levels.level_of(0.0, chosen, list(measured.values()), menu, torch.zeros(len(chosen), len(menu.settings)))
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
    """The lines: required of the paper's calibration as published at its usual theta; the others inform."""
    compared = Comparison(load_model(DEFAULT_MODEL, device=device), _say)
    compared.measure()
    points, count = compared.row_points(), len(compared.losses) - 1
    curve = [{"budget": budget, **vars(point)} for budget, point in zip(BUDGETS, points, strict=True)]
    rows = []
    for documents, where in ((slice(1), "as published"), (slice(1, None), f"on the same {count} documents")):
        for theta in reversed(THETAS):
            found = compared.paper_point(theta, documents)
            density = density_at(points, found.p99_error)
            line = f"density at the p99 row error of the paper's calibration {where}, theta {theta:g}"
            shown = f"density {density:.3f} for {found.density:.3f} at p99 {found.p99_error:.3f}"
            details = {"paper": vars(found), "density": density, "budgets": curve, "tokens": TOKENS}
            if theta == paper.THETA and where == "as published":
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
