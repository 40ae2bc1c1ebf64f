"""The command of this package: `sale-prefill calibrate`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from sale_attention import ModelFingerprint, Profile, SaleConfig, get_backend, save_profile
from sale_attention.crossover import costs_of, measured_backends
from sale_attention.profile import Geometry, Level
from sale_prefill_client._version import __version__
from sale_prefill_server.models import ModelError
from sale_prefill_server.models.cache import default_cache_dir

from .calibration import levels, paper, run
from .calibration.measure import Measurement
from .calibration.menu import SAMPLE_STRIDE, Menu
from .calibration.solve import HeadChoices
from .calibration.state import CalibrationState
from .calibration.texts import Document, default_documents, user_documents
from .models import FidelityModel, load_model

EXIT_OK = 0
EXIT_ERROR = 1
#: Levels of a profile, as multiples of the budget asked for, so that requests can name their own.
_BUDGET_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: Most a token's predictions may change, in nats, where nobody says otherwise: 98.8 % of the default model's most
#: likely next tokens stay, over ten documents from 2K to 8K (one H100, float32, 2026-11-25).
DEFAULT_ERROR_BUDGET = 0.001
#: The same with `--objective rows`: 1 % of rows may be off by a tenth.
DEFAULT_ROW_BUDGET = 0.1
_OBJECTIVES = {"predictions": DEFAULT_ERROR_BUDGET, "rows": DEFAULT_ROW_BUDGET}


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `calibrate`."""
    parser.add_argument("model", help="the default model's name, a directory, a .gguf file or a hub id")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the profile to write")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", default=[], help="texts like yours; default: English and code"
    )
    parser.add_argument(
        "--error-budget",
        metavar="X",
        type=float,
        help=f"most that predictions may change, in nats of divergence a token (default {DEFAULT_ERROR_BUDGET}); with "
        f"--objective rows the relative error that 99 %% of rows stay within (default {DEFAULT_ROW_BUDGET})",
    )
    parser.add_argument(
        "--objective",
        choices=tuple(_OBJECTIVES),
        default="predictions",
        help="what the budget is on: predictions, at the least cost (default), or attention's row errors, with the "
        "fewest blocks",
    )
    parser.add_argument(
        "--costs",
        metavar="BACKEND",
        choices=measured_backends(),
        help=f"backend whose costs count, where it is not this machine's: {', '.join(measured_backends())}",
    )
    parser.add_argument("--method", choices=("budget", "paper"), default="budget", help="paper: thresholds as in SALE")
    parser.add_argument("--tokens", metavar="N", type=int, default=8192, help="length of a document (default 8192)")
    parser.add_argument("--seed", type=int, default=0, help="of the key-value document and of drawn tokens (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Writes a profile. Returns an exit status."""
    budget = _OBJECTIVES[arguments.objective] if arguments.error_budget is None else arguments.error_budget
    method = "rows" if arguments.objective == "rows" else arguments.method
    try:
        _check(arguments, budget)
        model = load_model(arguments.model, device=arguments.device, on_progress=_say)
        documents = _documents(model, arguments)
        profile = calibrate(
            model,
            documents,
            budget,
            method=method,
            seed=arguments.seed,
            backend=arguments.costs,
            output=arguments.output,
        )
    except (ModelError, OSError, ValueError) as error:
        print(f"sale-prefill calibrate: {error}", file=sys.stderr)
        return EXIT_ERROR
    for level in profile.levels:
        _say(
            f"error budget {level.error_budget:g}: density {level.density:.3f}, "
            f"cost {level.estimated_cost:.3f} of dense, "
            f"mean row error {level.mean_error:.4f}, p99 {level.p99_error:.4f}"
        )
    _say(f"written: {arguments.output}; serve it: sale-prefill serve --model MODEL --profile {arguments.output}")
    return EXIT_OK


def _check(arguments: argparse.Namespace, budget: float) -> None:
    """Raises `ValueError` for what would else be found out after a model was loaded, or after minutes of measuring."""
    if not (budget * min(_BUDGET_FACTORS) > 0 and budget * max(_BUDGET_FACTORS) < float("inf")):
        raise ValueError(f"--error-budget {budget}: must be above 0 and finite; what may lose nothing is served dense")
    if arguments.method == "paper" and arguments.objective == "rows":
        raise ValueError("--method paper has an objective of its own: leave out --objective or --method")
    if arguments.method == "paper" and arguments.error_budget is not None:
        raise ValueError(
            f"--error-budget {budget:g}: --method paper has a bound of its own and measures what that gives: leave out "
            "--error-budget or --method"
        )
    least = SaleConfig().dense_rows
    if arguments.tokens <= least:
        raise ValueError(f"--tokens {arguments.tokens}: must be above {least}; rows before that position are dense")
    for file in arguments.text:
        if not file.is_file():
            raise ValueError(f"--text {file}: there is no such file; leave --text out for English and code")
    folder = arguments.output.parent
    if arguments.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--output {arguments.output}: cannot be written; name a file in a folder that is there")


def _documents(model: FidelityModel, arguments: argparse.Namespace) -> list[Document]:
    tokens = min(arguments.tokens, model.max_tokens)
    if arguments.text:
        found = user_documents(model, arguments.text, tokens, arguments.seed)
    else:
        found = default_documents(model, tokens, arguments.seed)
    # Rows of key-value retrieval are off most in heads that hardly matter to any other text (`calibration.rows`).
    return found[1:] if arguments.objective == "rows" else found


def calibrate(
    model: FidelityModel,
    documents: list[Document],
    error_budget: float,
    *,
    method: str = "budget",
    seed: int = 0,
    backend: str | None = None,
    config: SaleConfig | None = None,
    state_root: Path | None = None,
    output: Path | None = None,
) -> Profile:
    """A profile of `model`.

    Args:
        model: what to calibrate.
        documents: prompts longer than `config.dense_rows`; the paper's method uses the first alone.
        error_budget: of the default level: nats a token, or for "rows" a relative row error. The paper's method has
            one level without any, and measures what it gives.
        method: "budget", "rows" (see `calibration.rows`) or "paper" (paper, section 4.1: halve tau until the L1 error
            fits).
        seed: of the next tokens that are drawn.
        backend: whose costs count, such as "cpu-avx512"; by default of the one that is best on the model's device.
        config: block geometry; by default a row's sum takes in every `menu.SAMPLE_STRIDE`-th key, but for the paper's
            method.
        state_root: where finished pieces are kept until the profile is there; an interrupted run goes on.
        output: where to write the profile. Pieces stay until it is written.

    Raises:
        OSError: `output` cannot be written.
        ValueError: documents that are too short.
    """
    menu = paper.MENU if method == "paper" else Menu()
    if config is None:
        config = SaleConfig(sample_stride=0 if method == "paper" else SAMPLE_STRIDE)
    options = run.MeasuringOptions(config=config, menu=menu, seed=seed)
    short = [document.name for document in documents if len(document.token_ids) <= options.config.dense_rows]
    if short:
        raise ValueError(f"too short to calibrate on (up to {options.config.dense_rows} tokens): {', '.join(short)}")
    root = (default_cache_dir() / "calibration") if state_root is None else state_root
    state = CalibrationState(root, run.state_inputs(model, documents, options))
    passes = 2 * len(documents) + (method == "paper")
    backend = backend or get_backend("auto", model.device).description
    costs = costs_of(backend, model.head_dim, model.device.type)
    with tqdm(total=passes * model.num_layers, unit="layer", desc="calibrating") as progress:

        def on_layer() -> None:
            progress.update()

        centres = run.key_centres(model, documents, options.config, state, on_layer)
        measured = run.measure(model, documents, centres, options, state, on_layer)
        choices = levels.head_choices(measured, menu, costs, options.config)
        if method == "paper":
            taus = run.measure_taus(model, documents[0], centres, options.config, state, on_layer=on_layer)
            chosen = paper.settings_of(taus)
            budget = levels.expected_effect(choices, chosen)
            default = levels.level_of(budget, chosen, measured, menu, choices.cost)
            found = [default]
        else:
            found = _budget_levels(error_budget, method, measured, menu, choices)
            default = found[_BUDGET_FACTORS.index(1.0)]
    ascending = _by_error_budget(found, default)
    profile = Profile(
        name=model.name,
        fingerprint=ModelFingerprint.of(model.module),
        geometry=Geometry.of(options.config),
        method=method,
        text={
            "documents": [document.name for document in documents],
            "tokens": [len(document.token_ids) for document in documents],
            "seed": seed,
        },
        key_centres=centres,
        levels=ascending,
        default_level=ascending.index(default),
        created_with={
            "sale-prefill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "costs": backend,
        },
    )
    if output is not None:
        save_profile(profile, output)
    state.discard()
    return profile


def _budget_levels(
    error_budget: float, method: str, measured: list[Measurement], menu: Menu, choices: HeadChoices
) -> list[Level]:
    """One for each of `_BUDGET_FACTORS`."""
    make = levels.row_levels if method == "rows" else levels.budget_levels
    return make(measured, menu, choices, [error_budget * factor for factor in _BUDGET_FACTORS])


def _by_error_budget(found: list[Level], default: Level) -> tuple[Level, ...]:
    """One level a budget, ascending, the default one among them: row budgets may come to the same in nats."""
    unique = {level.error_budget: level for level in [*found, default]}
    return tuple(unique[budget] for budget in sorted(unique))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
