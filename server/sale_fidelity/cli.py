"""The command of this package: `sale-prefill calibrate`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from sale_attention import ModelFingerprint, Profile, SaleConfig, get_backend, save_profile
from sale_attention.crossover import costs_of
from sale_attention.profile import Geometry, HeadSetting, Level
from sale_prefill_client._version import __version__
from sale_prefill_server.models import ModelError
from sale_prefill_server.models.cache import default_cache_dir

from .calibration import levels, run
from .calibration.paper import THETA
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


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `calibrate`."""
    parser.add_argument("model", help="the default model's name, a directory, a .gguf file or a hub id")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the profile to write")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", default=[], help="texts like yours; default: English and code"
    )
    parser.add_argument(
        "--error-budget",
        metavar="NATS",
        type=float,
        default=DEFAULT_ERROR_BUDGET,
        help=f"most that predictions may change, in nats of divergence a token (default {DEFAULT_ERROR_BUDGET})",
    )
    parser.add_argument("--method", choices=("budget", "paper"), default="budget", help="paper: thresholds as in SALE")
    parser.add_argument("--tokens", metavar="N", type=int, default=8192, help="length of a document (default 8192)")
    parser.add_argument("--seed", type=int, default=0, help="of the key-value document and of drawn tokens (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Writes a profile. Returns an exit status."""
    if not 0 < arguments.error_budget < float("inf"):
        print(f"sale-prefill calibrate: --error-budget {arguments.error_budget}: must be above 0", file=sys.stderr)
        return EXIT_ERROR
    try:
        model = load_model(arguments.model, device=arguments.device, on_progress=_say)
        documents = _documents(model, arguments)
        profile = calibrate(model, documents, arguments.error_budget, method=arguments.method, seed=arguments.seed)
        save_profile(profile, arguments.output)
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


def _documents(model: FidelityModel, arguments: argparse.Namespace) -> list[Document]:
    tokens = min(arguments.tokens, model.max_tokens)
    if arguments.text:
        return user_documents(model, arguments.text, tokens, arguments.seed)
    return default_documents(model, tokens, arguments.seed)


def calibrate(
    model: FidelityModel,
    documents: list[Document],
    error_budget: float,
    *,
    method: str = "budget",
    seed: int = 0,
    config: SaleConfig | None = None,
    state_root: Path | None = None,
) -> Profile:
    """A profile of `model`.

    Args:
        model: what to calibrate.
        documents: prompts longer than `config.dense_rows`; the paper's method uses the first alone.
        error_budget: of the default level, nats a token; the paper's method has one level, and measures what it gives.
        method: "budget" or "paper" (paper, section 4.1: halve tau until the L1 error fits).
        seed: of the next tokens that are drawn.
        config: block geometry.
        state_root: where finished pieces are kept until the profile is there; an interrupted run goes on.

    Raises:
        ValueError: documents that are too short.
    """
    options = run.MeasuringOptions(config=config or SaleConfig(), seed=seed)
    short = [document.name for document in documents if len(document.token_ids) <= options.config.dense_rows]
    if short:
        raise ValueError(f"too short to calibrate on (up to {options.config.dense_rows} tokens): {', '.join(short)}")
    root = (default_cache_dir() / "calibration") if state_root is None else state_root
    state = CalibrationState(root, run.state_inputs(model, documents, options))
    passes = 2 * len(documents) + (method == "paper")
    with tqdm(total=passes * model.num_layers, unit="layer", desc="calibrating") as progress:
        found = _levels(model, documents, options, state, error_budget, method, lambda: progress.update())
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
        key_centres=found[1],
        levels=found[0],
        default_level=[level.error_budget for level in found[0]].index(error_budget),
        created_with={
            "sale-prefill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )
    state.discard()
    return profile


def _levels(
    model: FidelityModel,
    documents: list[Document],
    options: run.MeasuringOptions,
    state: CalibrationState,
    error_budget: float,
    method: str,
    on_layer: Callable[[], object],
) -> tuple[tuple[Level, ...], torch.Tensor]:
    """Levels and key centres."""
    config, menu = options.config, options.menu
    costs = costs_of(get_backend("auto", model.device).description, model.head_dim, model.device.type)
    centres = run.key_centres(model, documents, config, state, on_layer)
    measured = run.measure(model, documents, centres, options, state, on_layer)
    choices = levels.head_choices(measured, menu, costs, config)
    if method == "budget":
        return levels.budget_levels(measured, menu, choices, [error_budget * f for f in _BUDGET_FACTORS]), centres
    taus = run.measure_taus(model, documents[0], centres, config, state, theta=THETA, on_layer=on_layer)
    chosen = [_setting_of(tau, menu.settings) for layer in taus for tau in layer]
    return (levels.level_of(error_budget, chosen, measured, menu, choices.cost),), centres


def _setting_of(tau: float, settings: tuple[HeadSetting, ...]) -> int:
    if tau == 0:
        return len(settings) - 1
    sparse = [
        index for index, setting in enumerate(settings) if setting.strategy == "sparse" and setting.query_stride == 1
    ]
    return min(sparse, key=lambda index: abs((settings[index].tau or 0.0) - tau))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
