"""The live guard on the default model and real text: a planted fault is found, healthy requests raise nothing.

Every request is sampled here. A fault is a profile whose thresholds are 50 times too high in one layer, while it still
promises what was calibrated. Prompts are windows of 8,192 tokens of English and code that no calibration saw.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.gpu_rows import Row, at_most
from benchmarks.texts import english_reference_text, python_source_text
from sale_attention import ModelFingerprint, Profile, SaleConfig, get_backend, load_profile, shipped_profile
from sale_fidelity.models import FidelityModel, load_model
from sale_prefill_server.config import ServerConfig
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.guard import Guard, GuardReport, GuardSettings
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.kv.pool import KvPool

TOKENS = 8192
FAULT = 50.0
#: Sampled requests within which a fault must be found, and healthy ones that must raise nothing.
WITHIN, HEALTHY = 20, 200
#: Sources of code; calibration uses other modules and the English text from character 350,000 on.
_MODULES = ("argparse", "inspect", "typing", "tarfile", "pydoc", "turtle", "_pydecimal", "doctest", "subprocess", "ast")
_ENGLISH_CHARACTERS = 340_000
_CHARACTERS_PER_TOKEN = 6


def guard_rows(
    *,
    device: str = "auto",
    healthy: int = HEALTHY,
    faulty_layers: Sequence[int] | None = None,
    profile: Path | None = None,
) -> list[Row]:
    """The guard's lines.

    Args:
        device: where to run.
        healthy: requests that must raise nothing.
        faulty_layers: layers to plant a fault in, one at a time; by default the first, a middle and the last one with
            sparse heads.
        profile: instead of the one that comes with the package.
    """
    model = load_model("smollm2-135m-instruct", device=device)
    found = shipped_profile(ModelFingerprint.of(model.module)) if profile is None else load_profile(profile)
    if found is None:
        return [Row("guard", "a profile", "", "no profile belongs to the default model", False)]
    layers = _sparse_layers(found)
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]] if faulty_layers is None else faulty_layers
    return [
        _healthy_row(model, found, healthy),
        *(_fault_row(model, found, layer) for layer in chosen),
        _overhead_row(model, found),
    ]


def _sparse_layers(profile: Profile) -> list[int]:
    settings = profile.levels[profile.default_level].settings
    return [layer for layer, heads in enumerate(settings) if any(head.strategy == "sparse" for head in heads)]


def engine_of(
    model: FidelityModel, profile: Profile, share: float = 1.0, expectations: Profile | None = None
) -> Engine:
    """An engine as `serve` makes it, its guard sampling `share` of the requests, against `expectations`."""
    backend = get_backend("auto", model.device)
    budget = profile.levels[profile.default_level].error_budget
    return Engine(
        model.loaded,
        KvPool(model.loaded.kv_shape, 1 << 30),
        AttentionSettings(AttentionMode.SALE, 0.004, 1, budget),
        profile.geometry.applied_to(SaleConfig(query_block=backend.query_block)),
        chunk_tokens=2048 if model.device.type == "cpu" else 8192,
        attention_backend="auto",
        crossover=model.device.type == "cpu",  # a GPU would run prompts of this length dense
        profile=profile,
        guard=Guard(GuardSettings(share, True, seed=0), expectations or profile, lambda report: None),
    )


def prompts(model: FidelityModel, seed: int) -> Iterator[list[int]]:
    """Windows of 8,192 tokens, code and English in turns, for ever."""
    generator = random.Random(seed)
    texts = [_code(), english_reference_text()[:_ENGLISH_CHARACTERS]]
    while True:
        for text in texts:
            start = generator.randrange(len(text) - TOKENS * _CHARACTERS_PER_TOKEN)
            ids = model.encode(text[start : start + TOKENS * _CHARACTERS_PER_TOKEN])
            if len(ids) >= TOKENS:
                yield ids[:TOKENS]


@functools.cache
def _code() -> str:
    return "\n\n".join(python_source_text(module) for module in _MODULES)


def prefill(engine: Engine, token_ids: Sequence[int]) -> GuardReport | None:
    """One request in a session of its own."""
    sequence = engine.open(engine.defaults)
    try:
        sequence.kv.reserve(len(token_ids))
        audit = engine.begin_audit(sequence, 0, len(token_ids))
        while (start := sequence.num_tokens) < len(token_ids):
            chunk = token_ids[start : engine.next_boundary(start, len(token_ids))]
            record = engine.new_statistics()
            engine.prefill_chunk(sequence, chunk, prompt_end=len(token_ids), statistics=record, audit=audit)
        return None if audit is None else engine.finish_audit(sequence, audit)
    finally:
        sequence.release()


def _healthy_row(model: FidelityModel, profile: Profile, count: int) -> Row:
    engine, source = engine_of(model, profile), prompts(model, seed=1)
    alerts, errors, masses = [], [], []
    for _ in tqdm(range(count), desc="healthy requests", mininterval=10):
        report = prefill(engine, next(source))
        assert report is not None
        alerts += report.alerts
        errors.append(report.mean_error)
        masses.append(report.kept_mass)
    means = f"mean error {statistics.mean(errors):.4f}, kept mass {statistics.mean(masses):.4f}"
    measured = f"{len(alerts)} alerts in {count}; {means}"
    assert engine.guard is not None
    sums = sorted(engine.guard.layer_sums().items(), key=lambda item: -item[1])[:5]
    line = f"guard: alerts in {HEALTHY} healthy requests of 8K, all sampled"
    details = {"alerts": [vars(alert) for alert in alerts], "highest_sums_at_the_end": sums}
    return Row(line, "none", "", measured, not alerts and count >= HEALTHY, details)


def _fault_row(model: FidelityModel, profile: Profile, layer: int) -> Row:
    engine, source = engine_of(model, with_fault(profile, layer), expectations=profile), prompts(model, seed=2)
    found, dense = math.inf, math.inf
    reports = 0
    assert engine.guard is not None
    while reports < WITHIN and dense == math.inf:
        reports += 1
        report = prefill(engine, next(source))
        for alert in () if report is None else report.alerts:
            found = min(found, reports) if alert.layer == layer else found
            dense = min(dense, reports) if alert.layer == layer and alert.dense else dense
    strangers = (engine.guard.suspect_layers | {at for at, _ in engine.guard.guilty_heads}) - {layer}
    measured = f"found after {found:g}, first head dense after {dense:g}; other layers accused: {len(strangers)}"
    line = f"guard: thresholds of layer {layer} 50x too high, found and dense within sampled requests of 8K"
    return Row(line, f"<= {WITHIN}, no other", "", measured, dense <= WITHIN and not strangers)


def with_fault(profile: Profile, layer: int) -> Profile:
    """`profile` with the thresholds of `layer` multiplied."""
    levels = list(profile.levels)
    level = levels[profile.default_level]
    heads = tuple(
        replace(head, tau=head.tau * FAULT) if head.tau is not None else head for head in level.settings[layer]
    )
    settings = (*level.settings[:layer], heads, *level.settings[layer + 1 :])
    levels[profile.default_level] = replace(level, settings=settings)
    return replace(profile, levels=tuple(levels))


def _overhead_row(model: FidelityModel, profile: Profile, rounds: int = 6) -> Row:
    sampled, unsampled = engine_of(model, profile), engine_of(model, profile, share=0.0)
    source = prompts(model, seed=3)
    prompt = next(source)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * rounds + 2):
        engine = sampled if turn % 2 else unsampled
        _wait(model)
        started = time.perf_counter()
        prefill(engine, prompt)
        _wait(model)
        if turn >= 2:
            seconds[bool(turn % 2)].append(time.perf_counter() - started)
    extra = min(seconds[True]) / min(seconds[False]) - 1.0
    share = ServerConfig.guard_share
    line = f"guard: time of prefill at the default share of {share:g}, 8K"
    details = {"sampled_seconds": seconds[True], "unsampled_seconds": seconds[False]}
    return at_most(line, 1.0, None, 100 * share * max(0.0, extra), " %", **details)


def _wait(model: FidelityModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
