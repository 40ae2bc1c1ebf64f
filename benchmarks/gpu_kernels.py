"""Attention of one layer on one GPU against dense attention of the same run.

32 query and 8 KV heads, head_dim 128, bfloat16, causal.

Baselines and candidates take turns, each for a time long enough to reach its own clock, in one order and then in the
other: the card is limited by power and by heat. What ran before a call changes it by up to 4 % (FlashAttention-3 at
32K: 12.6 to 13.1 ms), another session by more (11.4 ms). Figures are medians. Calls are queued without waiting in
between, as the layers of a model are, so that the host's part shows only where it is slower.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_measure import l1_error
from benchmarks.attention_traces import load_trace
from benchmarks.gpu_rows import Row, at_least, at_most, information
from sale_attention import AttentionStatistics, BlockGrid, KvView, LayerPolicy, SaleConfig, attend, get_backend
from sale_attention.config import HeadPlan
from sale_attention.crossover import costs_of, crossover_position, longest_dense_prompt
from sale_attention.quantise import KeyCodes
from sale_attention.select import Selection

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
TAU = 0.004
CONFIG = SaleConfig(query_block=128)
#: Share of FlashAttention-3's time that selection may take, by query stride: required, aim.
SELECTION = {1: (24.0, 20.0), 2: (13.0, 10.5), 4: (7.5, 6.0)}
#: Speed-up of whole attention on the trace of layer 13: against cuDNN and FlashAttention-3, required and aim of each.
WHOLE = {2: ((3.4, 4.2), (3.0, 3.7)), 4: ((4.6, 5.6), (3.9, 4.8))}

Call = Callable[[], object]


def milliseconds(
    calls: dict[str, Call], rounds: int = 4, seconds: float = 0.15, settle_seconds: float = 0.25
) -> dict[str, list[float]]:
    """Times of every call, which take turns: each settles, then is timed, in every round; every other round backwards.

    With `seconds` 0 a turn is one call, and nothing settles: calls too short to heat anything, in pairs.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    expected = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        expected[name] = max(1e-5, statistics.median(_queued(call, 3)) / 1e3)
    for turn in range(rounds):
        for name, call in list(calls.items())[:: 1 if turn % 2 == 0 else -1]:
            if seconds:
                _queued(call, math.ceil(settle_seconds / expected[name]))
            times[name] += _queued(call, max(1, min(200, math.ceil(seconds / expected[name]))))
    return times


def _queued(call: Call, count: int) -> list[float]:
    events = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def medians(calls: dict[str, Call], rounds: int = 4) -> dict[str, float]:
    """As `milliseconds`, one figure a call."""
    return {name: statistics.median(taken) for name, taken in milliseconds(calls, rounds).items()}


def random_layer(tokens: int, shifted: bool = False) -> tuple[Tensor, KvView]:
    """Random queries, keys and values; `shifted` keys have a constant part, as real ones do."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, tokens, DIM, device="cuda", generator=generator)

    query, keys, values = normal(HEADS).bfloat16(), normal(KV_HEADS), normal(KV_HEADS).bfloat16()
    if shifted:
        keys += 2 * torch.randn(1, KV_HEADS, 1, DIM, device="cuda", generator=generator)
    return query, KvView(keys.bfloat16(), values)


def trace_layer(file: Path) -> tuple[Tensor, KvView]:
    """A trace's three query heads spread over 32, its KV head over 8."""
    trace = load_trace(file)
    query = trace.query[0, torch.arange(HEADS) % trace.heads][None].contiguous().cuda()
    keys, values = (tensor.expand(-1, KV_HEADS, -1, -1).contiguous().cuda() for tensor in (trace.keys, trace.values))
    return query, KvView(keys, values)


def torch_dense(query: Tensor, kv: KvView, backend: SDPBackend) -> Tensor:
    """Causal attention by one of torch's kernels."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, kv.keys, kv.values, is_causal=True, scale=SCALE, enable_gqa=True)


def dense_calls(query: Tensor, kv: KvView, names: Sequence[str]) -> dict[str, Call]:
    """Dense attention: "cudnn", "fa2" and "fa3" of those named; "fa3" only where its package is installed."""
    calls: dict[str, Call] = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):
        if name in names:
            calls[name] = lambda backend=backend: torch_dense(query, kv, backend)
    if "fa3" in names:
        try:
            from fa3_fwd_interface import flash_attn_func
        except ImportError:
            print("     fa3-fwd is not installed: lines against FlashAttention-3 fail", flush=True)
        else:
            rows = [tensor.transpose(1, 2).contiguous() for tensor in (query, kv.keys, kv.values)]
            calls["fa3"] = lambda: flash_attn_func(*rows, softmax_scale=SCALE, causal=True)
    return calls


@dataclass
class Phases:
    """SALE's passes of one layer, each on the outputs of the one before."""

    query: Tensor
    kv: KvView
    policy: LayerPolicy

    def __post_init__(self) -> None:
        self.backend = get_backend("cuda")
        self.grid = BlockGrid.of(self.query.shape[2], self.kv.tokens, CONFIG)
        self.plan = HeadPlan.resolve(self.policy, CONFIG, self.kv.tokens)
        shape = self.kv.keys.shape
        self.codes = torch.empty(shape, dtype=torch.int8, device="cuda")
        self.scales = torch.empty(*shape[:2], -(-shape[2] // 32), device="cuda")

    def selection(self) -> Selection:
        """Quantise, sink-local, thresholds, estimate; there are no lists to make: attention reads the bitmask."""
        key_codes = KeyCodes(self.codes, self.scales, self.backend.key_centre(self.kv, CONFIG))
        self.backend.quantise_key_range(self.kv, CONFIG, 0, key_codes)
        log_tau = self.policy.log_tau(self.query.device)
        query_codes, thresholds = self.backend.prepare_rows(
            self.query, self.kv, key_codes, self.plan, self.grid, CONFIG, log_tau, SCALE
        )
        return self.backend.select(query_codes, key_codes, thresholds, self.plan, self.grid, self.kv)

    def density(self, selection: Selection) -> Tensor:
        """Kept share of each head, sink and local included: float64 `[H]`."""
        kept = selection.kept_blocks().double() + self.grid.always_attended_blocks()
        return kept / self.grid.causal_blocks()


def selection_rows(tokens: int = 65_536) -> list[Row]:
    """Selection at strides 1, 2 and 4 as a share of FlashAttention-3."""
    query, kv = random_layer(tokens, shifted=True)
    phases = {stride: Phases(query, kv, LayerPolicy.uniform(HEADS, TAU, stride)) for stride in SELECTION}
    calls: dict[str, Call] = {f"stride {stride}": phase.selection for stride, phase in phases.items()}
    times = medians({**dense_calls(query, kv, ("fa3",)), **calls})
    fa3 = times.get("fa3", float("nan"))
    pairs = HEADS * tokens * tokens / 2
    rows = []
    for stride, (required, aim) in SELECTION.items():
        took = times[f"stride {stride}"]
        line = f"selection, {tokens // 1024}K, stride {stride}, share of FA3 dense"
        floor = 2 * DIM * pairs / stride / 1765e9
        details = {"milliseconds": took, "fa3_milliseconds": fa3, "floor_milliseconds": floor}
        rows.append(at_most(line, required, aim, 100 * took / fa3, " %", **details))
    return rows


def execution_rows(tokens: int = 65_536) -> list[Row]:
    """Attention over random lists of 32-key blocks for 128 rows."""
    query, kv = random_layer(tokens)
    phases = Phases(query, kv, LayerPolicy.uniform(HEADS, TAU, 1))
    grid, backend = phases.grid, phases.backend
    output, lse = torch.empty_like(query), torch.empty(1, HEADS, tokens, device="cuda")
    calls, flops = {}, {}
    for density in (0.1, 0.25):
        words = torch.zeros(1, HEADS, grid.query_blocks, grid.mask_words, dtype=torch.int32, device="cuda")
        for bit in range(32):
            words |= (torch.rand(words.shape, device="cuda") < density).int() << bit
        for index in range(grid.query_blocks):  # nothing kept where the lists are not read
            end = grid.selectable(index)[1]
            words[:, :, index, -(-end // 32) :] = 0
            if end % 32:
                words[:, :, index, end // 32] &= (1 << end % 32) - 1
        words[..., 0] &= ~1
        selection = Selection(words, grid.key_blocks)
        blocks = int(selection.kept_blocks().sum()) + HEADS * grid.always_attended_blocks()
        flops[density] = 4 * DIM * blocks * 128 * 32
        calls[f"{density}"] = lambda selection=selection: backend.compute(
            query, kv, selection, phases.plan, grid, SCALE, output, lse
        )
    times = medians({**calls, **dense_calls(query, kv, ("cudnn",))})
    return [
        at_least(
            f"execution, 128 x 32 lists, density {density:.2f}, {tokens // 1024}K, effective",
            530,
            620,
            flops[density] / times[f"{density}"] / 1e9,
            " TFLOPS",
            milliseconds=times[f"{density}"],
            cudnn_milliseconds=times["cudnn"],
        )
        for density in (0.1, 0.25)
    ]


def whole_call(query: Tensor, kv: KvView, stride: int, statistics: AttentionStatistics | None = None) -> Tensor:
    """One layer of a first prefill: nothing was quantised before."""
    policy = _policies.setdefault(stride, LayerPolicy.uniform(query.shape[1], TAU, stride))
    return attend(
        query, kv, policy=policy, config=CONFIG, backend="cuda", return_lse=False, scale=SCALE, statistics=statistics
    ).output


_policies: dict[int, LayerPolicy] = {}


def trace_rows(files: Sequence[Path]) -> list[Row]:
    """Whole attention on the traces."""
    rows, against_fa2 = [], {}
    for file in files:
        query, kv = trace_layer(file)
        calls: dict[str, Call] = {f"stride {s}": partial(whole_call, query, kv, s) for s in (2, 4)}
        times = medians({**dense_calls(query, kv, ("cudnn", "fa2", "fa3")), **calls})
        against_fa2[file.stem] = times["fa2"] / times["stride 2"]
        densities = {}
        for stride in (2, 4):
            counted = AttentionStatistics()
            whole_call(query, kv, stride, counted)
            densities[stride] = counted.density
        print(f"     {file.stem}: {times}, density {densities}", flush=True)
        if "layer13" not in file.stem:
            continue
        for stride, goals in WHOLE.items():
            for name, (required, aim) in zip(("cudnn", "fa3"), goals, strict=True):
                line = f"whole attention, layer 13 trace, tau {TAU}, stride {stride}, against {name}"
                speedup = times.get(name, float("nan")) / times[f"stride {stride}"]
                rows.append(at_least(line, required, aim, speedup, milliseconds=times, density=densities[stride]))
    if against_fa2:
        line = f"median of {len(against_fa2)} traces, tau {TAU}, stride 2, against FlashAttention-2"
        rows.append(at_least(line, 4.5, 6.0, statistics.median(against_fa2.values()), by_trace=against_fa2))
    if len(files) != 4:
        rows.append(Row("whole attention on four traces", "4 traces", "", f"{len(files)} found", False))
    return rows


def error_rows(files: Sequence[Path]) -> list[Row]:
    """The error against dense, beside the reference's at the same settings, on each trace's own heads."""
    ratios = {}
    for file in files:
        trace = load_trace(file)
        query, kv = trace.query.cuda(), KvView(trace.keys.cuda(), trace.values.cuda())
        exact = torch_dense(query, kv, SDPBackend.FLASH_ATTENTION)
        for stride in (1, 2, 4) if "layer13" in file.stem else (2,):
            policy = LayerPolicy.uniform(query.shape[1], TAU, stride)
            errors = [
                l1_error(attend(query, kv, policy=policy, config=CONFIG, backend=name).output, exact)
                for name in ("cuda", "reference")
            ]
            ratios[f"{file.stem}, stride {stride}"] = errors[0] / errors[1]
    line = "L1 error against dense on the traces, over the reference's, worst"
    return [at_most(line, 1.02, None, max(ratios.values()), "x", ratios=ratios)] if ratios else []


def kept_tenth(phases: Phases, share: float = 0.1) -> LayerPolicy:
    """Thresholds with which each head keeps `share` of its blocks, found by bisection."""
    low, high = torch.full((HEADS,), -12.0), torch.full((HEADS,), 12.0)
    for _ in range(14):
        middle = (low + high) / 2
        phases.policy = LayerPolicy(middle.exp(), phases.policy.query_stride)
        dense = phases.density(phases.selection()).cpu() > share
        low, high = torch.where(dense, middle, low), torch.where(dense, high, middle)
    return LayerPolicy(high.exp(), phases.policy.query_stride)


def long_rows(tokens: int = 131_072) -> list[Row]:
    """128K random queries and keys, a tenth kept, all passes timed."""
    query, kv = random_layer(tokens)
    phases = Phases(query, kv, LayerPolicy.uniform(HEADS, TAU, 4))
    policy = kept_tenth(phases)
    phases.policy = policy
    density = float(phases.density(phases.selection()).mean())

    def whole() -> Tensor:
        return attend(query, kv, policy=policy, config=CONFIG, backend="cuda", return_lse=False, scale=SCALE).output

    times = medians({**dense_calls(query, kv, ("cudnn", "fa3")), "sale": whole})
    line = f"{tokens // 1024}K, random Q/K, a tenth kept, all passes, stride 4, against cuDNN"
    return [at_least(line, 5.0, 7.0, times["cudnn"] / times["sale"], milliseconds=times, density=density)]


def short_rows(file: Path | None, pairs: int = 30) -> list[Row]:
    """Prompts of 1K to 8K with the crossover that a server uses, against the best dense call, in turns.

    Once as GPU time alone (calls captured as graphs: in a model the host runs ahead), once called one by one.
    """
    found: dict[int, dict[str, dict[str, float]]] = {}
    backend = get_backend("cuda")
    costs = costs_of(backend.description, DIM)
    crossover = crossover_position(costs, TAU, 2, CONFIG)
    config = replace(
        CONFIG, dense_rows=crossover, dense_prompt_tokens=longest_dense_prompt(costs, [(TAU, 2)] * HEADS, 1, crossover)
    )
    policy = LayerPolicy.uniform(HEADS, TAU, 2)
    layer = random_layer(8192) if file is None else trace_layer(file)
    for tokens in (1024, 2048, 3072, 4096, 5120, 6144, 8192):
        query, kv = _prefix(layer, tokens)

        def sale(query: Tensor = query, kv: KvView = kv) -> Tensor:
            return attend(query, kv, policy=policy, config=config, backend="cuda", return_lse=False, scale=SCALE).output

        dense = dense_calls(query, kv, ("cudnn", "fa2"))
        taken = milliseconds({**dense, "sale": sale}, pairs, seconds=0)
        graphs = milliseconds({name: _graph(call) for name, call in {**dense, "sale": sale}.items()}, pairs, seconds=0)
        calls, captured = ({n: statistics.median(t) for n, t in times.items()} for times in (taken, graphs))
        found[tokens] = {"calls": calls, "graphs": captured}
        print(f"     {tokens}: graphs {captured}, single calls {calls}", flush=True)
    return [_short_row(found, how, config) for how in ("graphs", "calls")]


def _short_row(found: dict[int, dict[str, dict[str, float]]], how: str, config: SaleConfig) -> Row:
    best = {tokens: min(times[how]["cudnn"], times[how]["fa2"]) for tokens, times in found.items()}
    over = {tokens: times[how]["sale"] - best[tokens] for tokens, times in found.items()}
    worst = max(over[tokens] - max(0.05 * best[tokens], 0.020) for tokens in found)
    faster = [tokens for tokens in found if over[tokens] < 0]
    sparse = f"sparse past {config.dense_prompt_tokens} tokens, from row {config.dense_rows} on"
    measured = f"worst {1e3 * worst:+.0f} us of the allowance; faster at {faster}; {sparse}"
    details: dict[str, Any] = {"milliseconds": {tokens: times[how] for tokens, times in found.items()}}
    named = {"graphs": "GPU time", "calls": "calls from Python"}[how]
    line = f"1K - 8K, 30 pairs, {named}, slower than dense by more than 5 % or 20 us"
    return Row(line, "never", "faster from 6K", measured, worst <= 0, details)


def _prefix(layer: tuple[Tensor, KvView], tokens: int) -> tuple[Tensor, KvView]:
    query, kv = layer
    parts = [tensor[:, :, :tokens].contiguous() for tensor in (query, kv.keys, kv.values)]
    return parts[0], KvView(parts[1], parts[2])


def _graph(call: Call) -> Call:
    """`call` captured as a CUDA graph: what the GPU does, without the host that launches it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def prototype_rows(folder: Path, tokens: int = 65_536) -> list[Row]:
    """Plain Triton beside it, at the settings that were its best."""
    import importlib
    import sys

    sys.path.insert(0, str(folder))
    ops = importlib.import_module("ops")
    query, kv = random_layer(tokens, shifted=True)
    queries, keys = query[0], kv.keys[0]
    rows = []
    for stride in SELECTION:
        words = torch.empty(HEADS, tokens // 64, tokens // 128, dtype=torch.uint8, device="cuda")

        def select(stride: int = stride, words: Tensor = words) -> None:
            centre, key_codes, key_scales = ops.quantise_k(keys)
            codes, thresholds = ops.quantise_q(queries, keys, centre, TAU, stride)
            ops.run_est(codes, thresholds, key_codes, key_scales, words, tokens, stride, 128, 128, 64, 4, 3, 1)

        times = medians({**dense_calls(query, kv, ("fa3",)), "triton": select})
        share = 100 * times["triton"] / times.get("fa3", float("nan"))
        rows.append(information(f"... plain Triton: selection, 64K, stride {stride}", f"{share:.1f} % of FA3", **times))
    return rows
