"""Timing of whole attention on a trace: SALE by any backend against the fastest dense SDPA, interleaved in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_floor import Ceilings, Floor, attention_work, floor_of, synchronise
from benchmarks.attention_traces import Trace
from sale_attention import AttentionStatistics, KvView, LayerPolicy, SaleConfig, attend, get_backend
from sale_attention.crossover import costs_of, crossover_position
from sale_attention.dense import dense_attention

#: Rounds are as many as fit these seconds, within the limits: short calls scatter more and cost less.
BUDGET_SECONDS = 30.0
MIN_ROUNDS, MAX_ROUNDS = 5, 200
_DENSE_TRIALS = 3
_DENSE = "dense"

Call = Callable[[], tuple[Tensor, AttentionStatistics | None]]


@dataclass(frozen=True)
class Setting:
    """One way to run SALE. Rows before `dense_rows` take dense attention; 0 measures where sparse starts to pay."""

    backend: str
    stride: int
    tau: float
    dense_rows: int = 0

    @property
    def label(self) -> str:
        """Backend and stride."""
        return f"{self.backend} stride {self.stride}"


def describe_backend(name: str) -> str:
    """What a backend runs on, such as "cpu-avx512", kernels built; its name where it does not say.

    Raises:
        SystemExit: it fell back to the reference, which would be timed in its place.
    """
    description = get_backend(name).description
    if description == "reference" != name:
        raise SystemExit(f"backend {name!r} has no kernels here and would run as the torch reference; see the log")
    return description


@dataclass(frozen=True)
class Sample:
    """One timed call: wall time and, for SALE, seconds by phase."""

    seconds: float
    phases: Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """One setting on one trace at one length.

    Attributes:
        trace: its name; `model` is what it was taken from.
        tokens: length of the prompt, all of it queries; `heads` share one KV head of `head_dim`.
        short_rows: of these, the first ones, that take dense attention whatever the threshold.
        setting: how SALE ran; `runs_on` is what its backend chose, such as an instruction set.
        rounds: how often each was timed.
        dense_variant: the way to call SDPA that was fastest here, whose time `dense_seconds` is.
        seconds: whole attention: quantise, sink-local, select, lists, compute, and the short rows.
        speedup: dense over SALE seconds of the same round.
        phase_seconds: medians by phase.
        dense_shares: by phase, its seconds over dense seconds of the same round, medians.
        density: share of causal blocks attended to.
        l1_error: sum of absolute differences to dense attention in float32, over the sum of its absolute outputs.
        dense_gflops: of dense attention, a worker (a CPU thread, or the GPU).
        execution_gflops: of the `compute` phase over its own blocks, a worker; None where every row is short.
        floor: least seconds at the ceilings of this machine.
    """

    trace: str
    model: str
    tokens: int
    short_rows: int
    heads: int
    head_dim: int
    setting: Setting
    runs_on: str
    rounds: int
    dense_variant: str
    dense_seconds: Spread
    seconds: Spread
    speedup: Spread
    phase_seconds: dict[str, float]
    dense_shares: dict[str, float]
    density: float
    l1_error: float
    dense_gflops: float
    execution_gflops: float | None
    floor: Floor


class DenseBaseline:
    """Which way to call SDPA is the fastest, found once for each shape, so that ratios to it are honest."""

    def __init__(self) -> None:
        self._best: dict[tuple[int, ...], str] = {}
        self.found: list[dict[str, Any]] = []

    def name(self, trace: Trace) -> str:
        """The fastest of `dense_calls` for a trace of this shape."""
        shape = tuple(trace.query.shape)
        if shape not in self._best:
            calls = {name: _without_statistics(call) for name, call in dense_calls(trace).items()}
            for call in calls.values():
                call()
            samples = interleave(calls, _DENSE_TRIALS, trace.query.device)
            medians = {name: statistics.median(s.seconds for s in taken) for name, taken in samples.items()}
            self._best[shape] = min(medians, key=lambda name: medians[name])
            self.found.append(
                {
                    "tokens": trace.tokens,
                    "heads": trace.heads,
                    "head_dim": trace.head_dim,
                    "seconds": medians,
                    "fastest": self._best[shape],
                }
            )
        return self._best[shape]


def dense_calls(trace: Trace) -> dict[str, Callable[[], Tensor]]:
    """Every way to call torch's causal SDPA on a group of query heads that share keys and values."""
    query, keys, values, scale = trace.query, trace.keys, trace.values, trace.scale
    heads = trace.heads

    def plain() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=heads > 1)

    def repeated() -> Tensor:
        all_keys, all_values = keys.repeat_interleave(heads, dim=1), values.repeat_interleave(heads, dim=1)
        return scaled_dot_product_attention(query, all_keys, all_values, is_causal=True, scale=scale)

    calls: dict[str, Callable[[], Tensor]] = {
        "sale_attention.dense": lambda: dense_attention(query, trace.kv, scale=scale),
        "enable_gqa": plain,
        "repeated keys and values": repeated,
    }
    if query.device.type == "cuda":
        calls["flash, enable_gqa"] = _pinned(SDPBackend.FLASH_ATTENTION, plain)
        calls["cudnn, enable_gqa"] = _pinned(SDPBackend.CUDNN_ATTENTION, plain)
    return calls


def exact_dense(trace: Trace) -> Tensor:
    """Dense attention in float32, that errors are taken against: SDPA in bfloat16 rounds as sparse attention does."""
    query, keys, values = (tensor.float() for tensor in (trace.query, trace.keys, trace.values))
    return dense_attention(query, KvView(keys, values), scale=trace.scale)


def sale_config(trace: Trace, setting: Setting) -> SaleConfig:
    """The geometry that a server would run this setting with."""
    config = SaleConfig()
    if setting.dense_rows:
        return SaleConfig(dense_rows=setting.dense_rows, centre_tokens=min(config.centre_tokens, setting.dense_rows))
    costs = costs_of(get_backend(setting.backend).description, trace.head_dim)
    return replace(config, dense_rows=crossover_position(costs, setting.tau, setting.stride, config))


def sale_call(trace: Trace, setting: Setting) -> Call:
    """Whole attention of a prompt, as a first prefill does it: nothing quantised before."""
    policy = LayerPolicy.uniform(trace.heads, tau=setting.tau, query_stride=setting.stride)
    config = sale_config(trace, setting)

    def call() -> tuple[Tensor, AttentionStatistics]:
        counts = AttentionStatistics()
        result = attend(
            trace.query,
            trace.kv,
            policy=policy,
            config=config,
            scale=trace.scale,
            statistics=counts,
            backend=setting.backend,
            return_lse=False,
        )
        return result.output, counts

    return call


@torch.inference_mode()
def measure(
    trace: Trace,
    settings: Sequence[Setting],
    ceilings: Ceilings,
    baseline: DenseBaseline,
    *,
    rounds: int | None = None,
    on_round: Callable[[int, int], object] = lambda done, total: None,
) -> list[Row]:
    """Times dense attention and every setting in turns over the whole of `trace`.

    Args:
        trace: inputs, on the device to measure.
        settings: how to run SALE.
        ceilings: of this machine.
        baseline: finds the dense call.
        rounds: how often each runs; None for what fits `BUDGET_SECONDS`.
        on_round: told how many rounds of how many are done.

    Raises:
        SystemExit: a backend has no kernels here, or does not run these inputs sparse.
    """
    for setting in settings:
        describe_backend(setting.backend)  # before anything is timed: this builds kernels
    variant = baseline.name(trace)
    calls: dict[str, Call] = {_DENSE: _without_statistics(dense_calls(trace)[variant])}
    calls |= {setting.label: sale_call(trace, setting) for setting in settings}
    first = {name: timed(call, trace.query.device) for name, call in calls.items()}
    exact = exact_dense(trace)
    if rounds is None:
        rounds = rounds_within(BUDGET_SECONDS, sum(seconds for seconds, _ in first.values()))
    samples = interleave(calls, rounds, trace.query.device, on_round)
    rows = []
    for setting in settings:
        output, counts = first[setting.label][1]
        assert counts is not None
        require_sparse(counts, setting)
        taken, error = samples[setting.label], l1_error(output, exact)
        rows.append(make_row(trace, setting, ceilings, variant, samples[_DENSE], taken, counts, error))
    return rows


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    on_round: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, list[Sample]]:
    """Times each call once a round, every other round backwards, so that a drift of the machine meets all alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            seconds, (_, counts) = timed(calls[name], device)
            samples[name].append(Sample(seconds, {} if counts is None else counts.phase_seconds))
        on_round(index + 1, rounds)
    return samples


def timed(call: Call, device: torch.device) -> tuple[float, tuple[Tensor, AttentionStatistics | None]]:
    """Seconds of `call`, the device's work included, and what it returned."""
    synchronise(device)
    started = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - started, result


def rounds_within(budget_seconds: float, round_seconds: float) -> int:
    """How many rounds of `round_seconds` fit, within `MIN_ROUNDS` and `MAX_ROUNDS`."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_seconds / max(round_seconds, 1e-9))))


def require_sparse(counts: AttentionStatistics, setting: Setting) -> None:
    """Ends the run where a backend quietly went dense: that would be timed as SALE."""
    if reasons := counts.unsupported_reasons:
        raise SystemExit(f"backend {setting.backend!r} runs these traces dense: {'; '.join(reasons)}")


def l1_error(output: Tensor, reference: Tensor) -> float:
    """Sum of absolute differences over the sum of absolute reference values, one head at a time to save memory."""
    difference = magnitude = 0.0
    for head in range(reference.shape[1]):
        expected = reference[:, head].float()
        difference += float((output[:, head].float() - expected).abs().sum(dtype=torch.float64))
        magnitude += float(expected.abs().sum(dtype=torch.float64))
    return difference / magnitude


def make_row(
    trace: Trace,
    setting: Setting,
    ceilings: Ceilings,
    dense_variant: str,
    dense: Sequence[Sample],
    taken: Sequence[Sample],
    counts: AttentionStatistics,
    error: float,
) -> Row:
    """What the samples of one setting say."""
    pairs = list(zip(dense, taken, strict=True))
    phases = {name: statistics.median(sample.phases[name] for sample in taken) for name in taken[0].phases}
    short_rows = counts.dense_rows["short"] // trace.heads
    work = attention_work(
        tokens=trace.tokens,
        short_rows=short_rows,
        heads=trace.heads,
        head_dim=trace.head_dim,
        stride=setting.stride,
        computed_blocks=sum(int(blocks.sum()) for blocks in counts.computed_blocks.values()),
        config=SaleConfig(),
    )
    dense_seconds = Spread.of([sample.seconds for sample in dense])
    return Row(
        trace=trace.name,
        model=trace.model,
        tokens=trace.tokens,
        short_rows=short_rows,
        heads=trace.heads,
        head_dim=trace.head_dim,
        setting=setting,
        runs_on=describe_backend(setting.backend),
        rounds=len(taken),
        dense_variant=dense_variant,
        dense_seconds=dense_seconds,
        seconds=Spread.of([sample.seconds for sample in taken]),
        speedup=Spread.of([slow.seconds / quick.seconds for slow, quick in pairs]),
        phase_seconds=phases,
        dense_shares={
            name: statistics.median(sample.phases[name] / slow.seconds for slow, sample in pairs) for name in phases
        },
        density=counts.density,
        l1_error=error,
        dense_gflops=work.dense_flops / dense_seconds.median / ceilings.workers / 1e9,
        execution_gflops=_gflops(work.execution_flops, phases["compute"], ceilings.workers),
        floor=floor_of(work, ceilings),
    )


def _gflops(flops: int, seconds: float, workers: int) -> float | None:
    return flops / seconds / workers / 1e9 if flops and math.isfinite(seconds) and seconds > 0 else None


def _without_statistics(call: Callable[[], Tensor]) -> Call:
    return lambda: (call(), None)


def _pinned(backend: SDPBackend, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def pinned() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return pinned
