"""Checks of calibrated profiles: what a file says every head does is one selection on every backend, in any chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import torch

from sale_attention import AttentionBackend, BlockGrid, HeadPlan, ModelFingerprint, Profile, QueryCodes
from sale_attention.profile import Geometry, HeadMeasure, HeadSetting, Level, dumps_profile, loads_profile
from tests.conformance.calls import check_whole_and_chunks
from tests.conformance.cases import Case
from tests.conformance.compare import require_equal, where
from tests.conformance.inputs import Problem, problem
from tests.conformance.layout import moved_key_codes, placed_kv, written_key_codes
from tests.conformance.pipeline import check_end_to_end

CHUNKS = (128, 256, 384)


def profile_of(case: Case) -> Profile:
    """A profile of one layer with the case's thresholds and strides by head, and centres that no keys' mean is."""
    taus, strides = (itertools.islice(itertools.cycle(v), case.heads) for v in (case.tau, case.stride))
    settings = tuple(map(_setting, taus, strides))
    level = Level(0.1, (settings,), ((HeadMeasure(0.5, 0.1, 0.2),) * case.heads,), 0.5, 0.1, 0.2, 0.5)
    mean = problem(case).centre.mean(dim=0)
    other = torch.randn(mean.shape, generator=torch.Generator().manual_seed(case.seed + 1))
    return Profile(
        name=str(case),
        fingerprint=ModelFingerprint("test", 1, case.heads, case.kv_heads, case.head_dim, 1, "0" * 64),
        geometry=Geometry.of(case.config),
        method="budget",
        text={},
        key_centres=(0.9 * mean + 0.3 * other).unsqueeze(0),
        levels=(level,),
    )


def _setting(tau: float, stride: int) -> HeadSetting:
    if 0 < tau < math.inf:
        return HeadSetting("sparse", tau, stride)
    return HeadSetting("streaming" if tau else "dense")


@cache
def profiled(case: Case) -> Problem:
    """The problem of `case` with policy and key centre out of a profile that was written and read again."""
    fresh = Problem(case)
    (fresh.policy,) = loads_profile(dumps_profile(profile_of(case))).policies()
    assert fresh.policy.key_centre is not None
    fresh.centre = fresh.policy.key_centre.expand(case.batch, -1, -1).contiguous()
    fresh.plan = HeadPlan.resolve(fresh.policy, case.config, case.prompt_end or case.tokens)
    return fresh


def check_profile_selection(backend: AttentionBackend, case: Case, device: str = "cpu") -> None:
    """From one profile, codes and thresholds, the reference's mask bit for bit, in calls of any multiple of 128."""
    inputs = profiled(case)
    assert case.config.code_bits == 8, "means of query blocks are not cut into pieces here"
    expected = inputs.selection.mask()
    key_codes = moved_key_codes(written_key_codes(inputs, inputs.key_codes), device)
    kv = placed_kv(inputs, device)
    for chunk in (*CHUNKS, None):
        ends = [*range((case.offset // 128 + 1) * 128, case.tokens, chunk), case.tokens] if chunk else [case.tokens]
        start = case.offset
        for end in ends:
            grid = BlockGrid.of(end - start, end, case.config)
            rows = slice(start - case.offset, end - case.offset)
            codes, scales = inputs.query_codes.codes[:, :, rows], inputs.query_codes.scales[:, :, rows]
            query_codes = QueryCodes(codes.to(device).contiguous(), scales.to(device).contiguous())
            thresholds = inputs.thresholds[:, :, rows].to(device).contiguous()
            found = backend.select(query_codes, key_codes, thresholds, inputs.plan, grid, kv.prefix(end))
            first = grid.first_query_block - inputs.grid.first_query_block
            wanted = expected[:, :, first : first + grid.query_blocks, : grid.key_blocks]
            place = f"{where(backend, case)}, profile, rows {start} to {end - 1}"
            axes = ("batch", "head", "query block of the call", "key block")
            require_equal(place, "block decisions", found.mask(), wanted, axes)
            start = end


def check_profile_calls(backend: AttentionBackend, cases: Sequence[Case], device: str = "cpu") -> None:
    """Whole calls with a profile's policy: the same bits in any chunks, and on all backends nearly the same selection.

    Nearly, because thresholds follow from floating-point sums; see `pipeline.check_end_to_end`.
    """
    for case in cases:
        check_whole_and_chunks(backend, profiled(case), device, CHUNKS)
    check_end_to_end(backend, cases, device, profiled)
