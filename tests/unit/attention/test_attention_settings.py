"""Settings, views, state, statistics and the registry: what is accepted, what is refused and in which words."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sale_attention import (
    AttentionStatistics,
    HeadPlan,
    KvView,
    LayerPolicy,
    LayerState,
    SaleConfig,
    attend,
    available_backends,
    get_backend,
    register_backend,
)
from sale_attention.quantise import default_key_centre, quantise_key
from tests.unit.attention.naive import SMALL, Shape, random_problem

BACKEND = get_backend("reference")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"query_block": 32}, "query_block=32 is not supported; use 64 or 128"),
        ({"key_block": 64}, "key_block=64 is not supported; use 32"),
        ({"code_bits": 16}, "code_bits=16 is not supported; use 8 or 4"),
        ({"sink_tokens": 20}, "sink_tokens=20 must be a multiple of key_block=32"),
        ({"local_tokens": -32}, "local_tokens=-32 must be a multiple of key_block=32, and not negative"),
        ({"dense_rows": 1000}, "dense_rows=1000 must be a multiple of query_block=64"),
        ({"dense_rows": 512}, "dense_rows=512 is below centre_tokens=1024"),
        ({"centre_tokens": 0}, "centre_tokens=0 must be at least 1"),
        ({"unstrided_tail_tokens": -1}, "unstrided_tail_tokens=-1 must not be negative"),
    ],
)
def test_config_names_what_is_wrong_and_what_is_accepted(field: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaleConfig(**field)


@pytest.mark.parametrize(
    ("tau", "stride", "message"),
    [
        ([[0.1]], [[1]], r"must be \[query heads\]"),
        ([0.1], [1, 1], "tau has shape"),
        ([-0.1], [1], "must be 0"),
        ([math.nan], [1], "must be 0"),
        ([0.1], [3], "query_stride=3 is not one of"),
    ],
)
def test_policy_refuses_what_does_not_fit(tau: list[Any], stride: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerPolicy(tau=torch.tensor(tau), query_stride=torch.tensor(stride))


def test_plan_marks_dense_and_streaming_heads_and_the_unstrided_tail() -> None:
    policy = LayerPolicy(tau=torch.tensor([0.0, math.inf, 0.004]), query_stride=torch.tensor([1, 2, 4]))
    assert HeadPlan.resolve(policy, SaleConfig(), 1000) == HeadPlan((0, 0, 4), (True, False, False), 832)
    assert HeadPlan.resolve(policy, SaleConfig(query_block=128), 1000).unstrided_from == 768
    assert HeadPlan.resolve(policy, SaleConfig(), 5).unstrided_from == 0


def test_kv_view_refuses_what_does_not_fit() -> None:
    keys = torch.zeros(2, 1, 64, 8)
    table = torch.zeros(1, 2, dtype=torch.int64)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("agree in the first three", (keys, keys[:, :, :5])),
        ("they must agree", (keys, keys.half())),
        ("length=65 must lie in 1 .. 64", (keys, keys, None, 65)),
        ("length=0 must lie in", (keys, keys, None, 0)),
        ("must be a multiple of 32", (keys[:, :, :40], keys[:, :, :40], table, 10)),
        ("int64", (keys, keys, table.int(), 10)),
        ("needs length=", (keys, keys, table)),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            KvView(*arguments)


def test_attend_refuses_what_does_not_fit() -> None:
    query, kv = random_problem(Shape(rows=10))
    cases: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
        ("rows >= 1", query[:, :, :0], {}),
        ("heads a multiple of the kv heads", query[..., :32], {}),
        ("rows stand at the end of the keys", torch.cat([query, query], dim=2), {}),
        ("they must agree", query.float(), {}),
        ("the policy has 3 heads, the query 2", query, {"policy": LayerPolicy.uniform(3)}),
        ("window=0 must be at least 1", query, {"window": 0}),
        (
            "no attention backend named 'cudnn'; available: auto, reference, dense, cpu, cuda",
            query,
            {"backend": "cudnn"},
        ),
    ]
    for message, bad_query, arguments in cases:
        with pytest.raises(ValueError, match=message):
            attend(bad_query, kv, **arguments)


def test_a_centre_of_the_wrong_shape_is_refused() -> None:
    query, kv = random_problem(Shape(rows=200))
    policy = LayerPolicy(torch.tensor([0.1, 0.1]), torch.tensor([1, 1]), torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"key_centre has shape \(2, 64\); these keys need \[1, 64\]"):
        attend(query, kv, policy=policy, config=SMALL)


def test_a_calibrated_centre_replaces_the_prompts_mean() -> None:
    _, kv = random_problem(Shape(rows=200))
    centre = torch.full((1, 64), 0.25)
    policy = LayerPolicy(torch.tensor([0.1, 0.1]), torch.tensor([1, 1]), centre)
    codes = LayerState().update(kv, policy, SMALL, BACKEND)
    assert torch.equal(codes.codes, quantise_key(kv, centre[None], SMALL).codes)


def test_backends_register_by_name_once() -> None:
    assert available_backends()[:4] == ("reference", "dense", "cpu", "cuda")
    with pytest.raises(ValueError, match="'reference' is registered already"):
        register_backend(get_backend("reference"))


@pytest.mark.parametrize("bits", [8, 4])
def test_state_grown_step_by_step_holds_the_codes_of_the_whole(bits: int) -> None:
    _, kv = random_problem(Shape(rows=500, kv_heads=2, batch=2))
    config = SaleConfig(dense_rows=64, centre_tokens=64, code_bits=bits)
    policy, state = LayerPolicy.uniform(2), LayerState()
    expected = quantise_key(kv, default_key_centre(kv, config), config)
    for tokens in (100, 128, 129, 131, 300, 500):
        codes = state.update(kv.prefix(tokens), policy, config, BACKEND)
        assert state.tokens == tokens // 32 * 32
    assert torch.equal(codes.codes, expected.codes)
    assert torch.equal(codes.scales, expected.scales)


def test_state_follows_a_rollback_and_a_fork() -> None:
    _, kv = random_problem(Shape(rows=300))
    _, other = random_problem(Shape(rows=300), seed=1)
    keys, values = (
        torch.cat([ours[:, :, :150], theirs[:, :, 150:]], dim=2)
        for ours, theirs in ((kv.keys, other.keys), (kv.values, other.values))
    )
    branched = KvView(keys, values)
    policy, state = LayerPolicy.uniform(2), LayerState()
    state.update(kv, policy, SMALL, BACKEND)
    fork = state.clone()
    fork.truncate(150)
    codes = fork.update(branched, policy, SMALL, BACKEND)
    assert torch.equal(codes.codes, quantise_key(branched, codes.centre, SMALL).codes)
    kept = state.update(kv, policy, SMALL, BACKEND)
    assert torch.equal(kept.codes, quantise_key(kv, kept.centre, SMALL).codes)
    assert torch.equal(kept.centre, codes.centre)
    assert state.nbytes > 300 * 64


def test_state_cut_into_the_keys_of_its_centre_takes_a_new_centre() -> None:
    _, kv = random_problem(Shape(rows=300))
    _, other = random_problem(Shape(rows=300), seed=1)
    policy, state = LayerPolicy.uniform(2), LayerState()
    state.update(kv, policy, SMALL, BACKEND)
    state.truncate(10)
    codes = state.update(other, policy, SMALL, BACKEND)
    assert torch.equal(codes.centre, default_key_centre(other, SMALL))
    assert torch.equal(codes.codes, quantise_key(other, codes.centre, SMALL).codes)


def test_state_of_another_session_or_width_is_refused() -> None:
    _, kv = random_problem(Shape(rows=100))
    _, wider = random_problem(Shape(rows=100, head_dim=96))
    policy, state = LayerPolicy.uniform(2), LayerState()
    state.update(kv, policy, SMALL, BACKEND)
    with pytest.raises(ValueError, match="use one state per session and layer"):
        state.update(wider, policy, SMALL, BACKEND)
    four_bit = SaleConfig(dense_rows=64, centre_tokens=64, code_bits=4)
    with pytest.raises(ValueError, match="holds 8-bit codes"):
        state.update(kv, policy, four_bit, BACKEND)


def run(rows: range, chunk: int, policy: LayerPolicy, **arguments: Any) -> AttentionStatistics:
    query, kv = random_problem(Shape(rows=rows.stop, heads=4, kv_heads=2))
    statistics = AttentionStatistics()
    for start in range(rows.start, rows.stop, chunk):
        end = min(start + chunk, rows.stop)
        attend(query[:, :, start:end], kv.prefix(end), policy=policy, config=SMALL, statistics=statistics, **arguments)
    return statistics


def test_blocks_are_counted_by_head() -> None:
    policy = LayerPolicy(tau=torch.tensor([0.0, math.inf, math.inf, 1e-30]), query_stride=torch.ones(4))
    statistics = run(range(300), 300, policy, layer=7)
    # Query blocks of 64 rows see 2, 4, 6, 8 and 10 key blocks of 32; 300 rows end in the tenth.
    assert statistics.causal_blocks[7].tolist() == [30, 30, 30, 30]
    # Dense, then sink + 64 local + own: 2, 4, 1 + 4, 1 + 4, 1 + 4 (of which the first block is dense anyway).
    assert statistics.computed_blocks[7].tolist() == [30, 21, 21, 30]
    assert statistics.layers == [7]
    assert statistics.density == pytest.approx(102 / 120)
    assert statistics.density_by_layer() == {7: pytest.approx(102 / 120)}


def test_a_short_prompt_is_dense_in_every_chunk_and_a_longer_one_in_none() -> None:
    query, kv = random_problem(Shape(300, 0, 4, 2))
    config, policy = replace(SMALL, dense_prompt_tokens=300), LayerPolicy.uniform(4, tau=1.0)

    def output(prompt_end: int, pieces: list[int]) -> Tensor:
        parts = [
            attend(query[:, :, start:end], kv.prefix(end), policy=policy, config=config, prompt_end=prompt_end).output
            for start, end in pairwise(pieces)
        ]
        return torch.cat(parts, dim=2)

    dense = attend(query, kv, policy=policy, config=replace(SMALL, dense_rows=320)).output
    sparse = attend(query, kv, policy=policy, config=SMALL, prompt_end=301).output
    assert not torch.equal(dense, sparse)
    for pieces in ([0, 300], [0, 128, 256, 300]):
        assert torch.equal(output(300, pieces), dense)
        assert torch.equal(output(301, pieces), sparse)


def test_dense_rows_are_counted_by_reason() -> None:
    mixed = LayerPolicy(tau=torch.tensor([0.0, 0.1, 0.1, 0.1]), query_stride=torch.ones(4))
    none = {"requested": 0, "short": 0, "head": 0, "unsupported": 0}
    statistics = run(range(300), 300, mixed)
    assert statistics.dense_rows == none | {"short": 64 * 4, "head": 236}
    assert statistics.rows == 300 * 4
    assert run(range(300), 300, mixed, dense=True).dense_rows == none | {"requested": 1200}
    assert run(range(300), 300, mixed, backend="dense").dense_rows == none | {"requested": 1200}
    windowed = run(range(300), 300, mixed, window=100)
    assert windowed.dense_rows == none | {"unsupported": 1200}
    assert windowed.unsupported_reasons == ("sliding window of 100 tokens",)
    assert windowed.density == 1.0


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_counts_do_not_depend_on_the_chunking(tau: float) -> None:
    whole = run(range(600), 600, LayerPolicy.uniform(4, tau))
    chunks = run(range(600), 128, LayerPolicy.uniform(4, tau))
    assert torch.equal(whole.computed_blocks[0], chunks.computed_blocks[0])
    assert torch.equal(whole.causal_blocks[0], chunks.causal_blocks[0])
    assert whole.dense_rows == chunks.dense_rows
    assert whole.rows == chunks.rows


def test_every_phase_is_timed_and_reset_forgets() -> None:
    statistics = run(range(300), 300, LayerPolicy.uniform(4, 0.1))
    seconds = statistics.phase_seconds
    assert set(seconds) == {"quantise", "sink_local", "select", "compute", "dense"}
    assert all(value > 0 for value in seconds.values())
    assert statistics.estimation_seconds == pytest.approx(
        seconds["quantise"] + seconds["sink_local"] + seconds["select"]
    )
    assert statistics.attention_seconds == pytest.approx(seconds["compute"] + seconds["dense"])
    statistics.reset()
    assert statistics.rows == 0
    assert statistics.layers == []
    assert statistics.density == 1.0
    assert statistics.attention_seconds == 0
