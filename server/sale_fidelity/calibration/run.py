"""Measuring a model on its calibration documents: key centres first, then every layer of every document.

Bounded memory: one layer's attention at a time (`capture`). Resumable: a file a finished layer of a document (`state`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sale_attention import SaleConfig

from ..agreement import quickest_backend
from ..models import FidelityModel
from .capture import LayerCapture, backward_layers, forward_layers
from .measure import Measurement, measure_layer, sampled_blocks
from .menu import Menu
from .paper import THETA, paper_taus
from .state import CalibrationState
from .texts import Document

# Raised whenever the same inputs give other results, so that states of older code are not taken up.
_CODE_VERSION = 2
#: Query blocks a document and layer that settings are measured on; 16 give 1,024 rows.
SAMPLED_BLOCKS = 16
# Documents sample different places of their stretches: multiples of the golden ratio spread evenly.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, and how closely.

    Attributes:
        config: block geometry and code width.
        menu: settings that a head may get.
        blocks: query blocks sampled from each document.
        seed: of the drawn next tokens.
    """

    config: SaleConfig = field(default_factory=SaleConfig)
    menu: Menu = field(default_factory=Menu)
    blocks: int = SAMPLED_BLOCKS
    seed: int = 0


def state_inputs(model: FidelityModel, documents: Sequence[Document], options: Any) -> dict[str, Any]:
    """What results depend on, for `CalibrationState`."""
    texts = [hashlib.sha256(str(document.token_ids).encode()).hexdigest() for document in documents]
    return {
        "code": _CODE_VERSION,
        "model": model.loaded.fingerprint,
        "texts": texts,
        "options": asdict(options),
    }


def key_centres(
    model: FidelityModel,
    documents: Sequence[Document],
    config: SaleConfig,
    state: CalibrationState,
    on_layer: Callable[[], object] = lambda: None,
) -> Tensor:
    """Mean of all documents' keys by layer and KV head, float32 `[L, Hkv, d]`, on the CPU.

    Args:
        model: what to run.
        documents: each counts by its length.
        config: block geometry.
        state: finished pieces.
        on_layer: called after each layer of each document.
    """
    total = torch.zeros(model.num_layers, model.num_kv_heads, model.head_dim, dtype=torch.float64)
    for number, document in enumerate(documents):
        name = f"keys-{number:03d}"
        found = state.load(name)
        if found is None:
            sums = torch.zeros_like(total)

            def add(capture: LayerCapture, sums: Tensor = sums) -> None:
                sums[capture.layer] = capture.keys[0].sum(dim=1, dtype=torch.float64).cpu()
                on_layer()

            forward_layers(model, document.token_ids, add)
            found = {"sums": sums}
            state.save(name, found)
        else:
            for _ in range(model.num_layers):
                on_layer()
        total += found["sums"]
    tokens = sum(len(document.token_ids) for document in documents)
    return (total / tokens).to(torch.float32)


def measure(
    model: FidelityModel,
    documents: Sequence[Document],
    centres: Tensor,
    options: MeasuringOptions,
    state: CalibrationState,
    on_layer: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """Every setting's cost and effect, by layer, all documents added.

    Args:
        model: what to run.
        documents: prompts longer than `config.dense_rows`.
        centres: float32 `[L, Hkv, d]`.
        options: what to measure.
        state: finished pieces.
        on_layer: called after each layer of each document.
    """
    zero = Measurement.zero(model.num_query_heads, options.menu.measured)
    totals = [zero] * model.num_layers
    for number, document in enumerate(documents):
        names = [f"measured-{number:03d}-{layer:03d}" for layer in range(model.num_layers)]
        found = [state.load(name) for name in names]
        if any(piece is None for piece in found):
            phase = (0.5 + number * _GOLDEN) % 1.0
            blocks = sampled_blocks(len(document.token_ids), options.config, options.blocks, phase)
            for capture in backward_layers(model, document.token_ids, options.seed + number):
                layer = capture.layer
                if found[layer] is None:
                    measured = measure_layer(capture, centres[layer], options.config, options.menu, blocks)
                    found[layer] = measured.tensors()
                    state.save(names[layer], measured.tensors())
                on_layer()
        else:
            for _ in range(model.num_layers):
                on_layer()
        totals = [total + Measurement(**piece) for total, piece in zip(totals, found, strict=True) if piece is not None]
    return totals


def measure_taus(
    model: FidelityModel,
    document: Document,
    centres: Tensor,
    config: SaleConfig,
    state: CalibrationState,
    *,
    theta: float = THETA,
    on_layer: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """The paper's thresholds by layer and head, from one prompt; 0 for a dense head. See `paper`."""
    taus: dict[int, list[float]] = {}

    def settle(capture: LayerCapture) -> None:
        name = f"taus-{capture.layer:03d}"
        found = state.load(name)
        if found is None:
            settled = paper_taus(capture, centres[capture.layer], config, theta, quickest_backend(model))
            found = {"taus": torch.tensor(settled, dtype=torch.float64)}
            state.save(name, found)
        taus[capture.layer] = found["taus"].tolist()
        on_layer()

    forward_layers(model, document.token_ids, settle)
    return [taus[layer] for layer in range(model.num_layers)]
