"""What SALE does to attention's outputs, head by head, on the inputs that dense attention gives every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sale_attention import AttentionStatistics, KvView, LayerState, SaleConfig, attend, get_backend
from sale_attention.config import HeadPlan
from sale_attention.crossover import AttentionCosts, costs_of
from sale_attention.geometry import BlockGrid

from ..calibration.capture import LayerCapture, forward_layers
from ..models import FidelityModel
from .setting import EvaluationSetting

#: What a cell of a drawn mask says: not seen (causality), skipped, selected, always attended (sink, local, short rows).
UNSEEN, SKIPPED, SELECTED, ALWAYS = range(4)


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """One setting on one document; tensors are float32 `[layers, query heads]` on the CPU.

    Errors are |o - o_dense| / |o_dense| of rows from `SaleConfig.dense_rows` on; `density` is the share of these rows'
    causal blocks that was computed; `cost` is that of the same rows' attention relative to dense, from the table of
    costs in `sale_attention.crossover`.
    """

    setting: EvaluationSetting
    density: Tensor
    mean_error: Tensor
    p99_error: Tensor
    cost: float
    pooled_mean_error: float
    pooled_p99_error: float


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """What one head attends to: uint8 `[query blocks, key blocks]`, one of the constants above each."""

    layer: int
    head: int
    density: float
    cells: Tensor


def head_errors(
    model: FidelityModel,
    token_ids: Sequence[int],
    settings: Sequence[EvaluationSetting],
    on_layer: Callable[[], object] | None = None,
) -> list[HeadErrors]:
    """Errors of every head under each of `settings`; the model runs once, dense.

    Raises:
        ValueError: the document has no row past `SaleConfig.dense_rows`.
    """
    first = max(setting.config.dense_rows for setting in settings)
    if len(token_ids) <= first:
        raise ValueError(f"{len(token_ids)} tokens: rows are sparse from position {first} on; take a longer document")
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in settings]

    def observe(capture: LayerCapture) -> None:
        for found, setting in zip(rows, settings, strict=True):
            found.append(_layer(capture, setting))
        if on_layer is not None:
            on_layer()

    forward_layers(model, token_ids, observe)
    costs = _costs(model)
    return [_collected(setting, found, costs) for setting, found in zip(settings, rows, strict=True)]


def drawn_mask(
    model: FidelityModel, token_ids: Sequence[int], setting: EvaluationSetting, layer: int, head: int
) -> DrawnMask:
    """What `head` of `layer` attends to under `setting`, block by block."""
    kept: list[DrawnMask] = []

    def observe(capture: LayerCapture) -> None:
        if capture.layer == layer:
            kept.append(_mask(capture, setting, head))

    forward_layers(model, token_ids, observe)
    return kept[0]


def estimated_cost(setting: EvaluationSetting, density: Tensor, costs: AttentionCosts) -> float:
    """Attention's cost relative to dense: blocks computed and pairs estimated, averaged over heads."""
    shares = []
    for policy, heads in zip(setting.policies, density.tolist(), strict=True):
        for stride, is_dense, share in zip(policy.estimated_strides, policy.dense_heads, heads, strict=True):
            estimate = costs.estimate_pair_seconds / stride if stride else 0.0
            sparse = estimate + share * costs.compute_pair_seconds
            shares.append(1.0 if is_dense else sparse / costs.dense_pair_seconds)
    return sum(shares) / len(shares)


def typical_head(errors: HeadErrors) -> tuple[int, int]:
    """Layer and head whose density is the median of the sparse heads': what is drawn."""
    heads = [
        (float(errors.density[layer, head]), layer, head)
        for layer, policy in enumerate(errors.setting.policies)
        for head, stride in enumerate(policy.estimated_strides)
        if stride
    ]
    _, layer, head = sorted(heads)[len(heads) // 2] if heads else (0.0, 0, 0)
    return layer, head


def _costs(model: FidelityModel) -> AttentionCosts:
    found = costs_of(get_backend("auto", model.device).description, model.head_dim, model.device.type)
    return found if found.dense_pair_seconds > 0 else costs_of("cpu-avx512", model.head_dim)


def _layer(capture: LayerCapture, setting: EvaluationSetting) -> tuple[Tensor, Tensor]:
    """Density `[H]` and row errors `[H, rows]` of one layer, on the CPU."""
    statistics, config = AttentionStatistics(), setting.config
    result = attend(
        capture.query,
        KvView(capture.keys, capture.values),
        policy=setting.policies[capture.layer],
        config=config,
        scale=capture.scale,
        statistics=statistics,
        backend=setting.backend,
        return_lse=False,
    )
    exact = capture.output[0].transpose(0, 1)[:, config.dense_rows :].float()
    found = result.output[0][:, config.dense_rows :].float()
    errors = (found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-20)
    short = BlockGrid.of(config.dense_rows, config.dense_rows, config).causal_blocks()
    computed, causal = statistics.computed_blocks[0] - short, statistics.causal_blocks[0] - short
    return computed / causal, errors.cpu()


def _collected(
    setting: EvaluationSetting, layers: Sequence[tuple[Tensor, Tensor]], costs: AttentionCosts
) -> HeadErrors:
    density, errors = (torch.stack(column).float() for column in zip(*layers, strict=True))
    p99 = errors.kthvalue(max(1, round(0.99 * errors.shape[2])), dim=2).values
    flat = errors.flatten()
    return HeadErrors(
        setting=setting,
        density=density,
        mean_error=errors.mean(dim=2),
        p99_error=p99,
        cost=estimated_cost(setting, density, costs),
        pooled_mean_error=float(flat.mean()),
        pooled_p99_error=float(flat.kthvalue(max(1, round(0.99 * flat.numel()))).values),
    )


def _mask(capture: LayerCapture, setting: EvaluationSetting, head: int) -> DrawnMask:
    config, policy, tokens = setting.config, setting.policies[capture.layer], capture.query.shape[2]
    grid = BlockGrid.of(tokens, tokens, config)
    selected = _selected(capture, setting, config)[head] if policy.estimated_strides[head] else None
    cells = torch.zeros(grid.query_blocks, grid.key_blocks, dtype=torch.uint8)
    for index in range(grid.query_blocks):
        sink_end, local_start, local_end = grid.always_attended(index)
        cells[index, :local_end] = SKIPPED
        if grid.block_start(index) < config.dense_rows or policy.dense_heads[head]:
            cells[index, :local_end] = ALWAYS
            continue
        cells[index, :sink_end] = ALWAYS
        cells[index, local_start:local_end] = ALWAYS
        if selected is not None:
            row = selected[index - config.dense_rows // config.query_block]
            cells[index, : row.shape[0]][row & (cells[index] == SKIPPED)] = SELECTED
    seen = cells != UNSEEN
    density = float((seen & (cells != SKIPPED)).sum()) / float(seen.sum())
    return DrawnMask(capture.layer, head, density, cells)


def _selected(capture: LayerCapture, setting: EvaluationSetting, config: SaleConfig) -> Tensor:
    """Selected blocks of the rows from `dense_rows` on: bool `[H, query blocks, key blocks]` on the CPU."""
    backend, policy = get_backend(setting.backend, capture.query.device), setting.policies[capture.layer]
    kv, tokens = KvView(capture.keys, capture.values), capture.query.shape[2]
    query = capture.query[:, :, config.dense_rows :]
    grid = BlockGrid.of(query.shape[2], tokens, config)
    key_codes = LayerState().update(kv, policy, config, backend)
    log_tau = policy.log_tau(query.device)
    plan = HeadPlan.resolve(policy, config, tokens)
    codes, thresholds = backend.prepare_rows(query, kv, key_codes, plan, grid, config, log_tau, capture.scale)
    return backend.select(codes, key_codes, thresholds, plan, grid, kv).mask()[0].cpu()
