"""Every backend of this machine against the reference, on the fixed grid and on random cases."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sale_attention import AttentionBackend, SaleConfig, get_backend
from tests.conformance import cases, kit
from tests.conformance.cases import TAU, Case


@dataclass(frozen=True)
class Candidate:
    """A backend to be examined.

    Attributes:
        name: for test ids.
        make: called when its first test runs; may skip.
        device: where it runs.
        threads_show: whether the number of threads may change last bits, so that the check of it is left out.
    """

    name: str
    make: Callable[[], AttentionBackend]
    device: str = "cpu"
    threads_show: bool = False


def native(isa: str) -> Callable[[], AttentionBackend]:
    """The native CPU backend on one instruction set; skips where this machine cannot build or run it."""

    def make() -> AttentionBackend:
        cpu = pytest.importorskip("sale_attention.cpu", reason="this build has no native CPU backend")
        from sale_attention.jit import KernelBuildError

        try:
            isas = cpu.available_isas()
        except KernelBuildError as error:
            # Where there is a compiler, kernels that it refuses are a fault of ours.
            if shutil.which("g++") or shutil.which("c++"):
                raise
            pytest.skip(f"the native CPU backend cannot be built here: {error}")
        if isa not in isas:
            pytest.skip(f"this machine does not run {isa}; it runs {', '.join(isas)}")
        backend: AttentionBackend = cpu.CpuBackend(isa=isa)
        assert backend.description == f"cpu-{isa}", "it fell back to the reference"
        return backend

    return make


#: A new backend joins with a line here.
CANDIDATES = [
    # torch's matrix products are split by threads, and a few rows of scores show it.
    Candidate("reference", lambda: get_backend("reference"), threads_show=True),
    *(Candidate(f"cpu-{isa}", native(isa)) for isa in ("avx512_vnni", "avx512", "avx2", "portable")),
    Candidate("cuda", lambda: get_backend("cuda"), device="cuda"),
]


@dataclass(frozen=True, eq=False)
class Subject:
    """A candidate in existence."""

    backend: AttentionBackend
    device: str
    threads_show: bool
    _reasons: dict[Case, str | None] = field(default_factory=dict)

    def takes(self, case: Case) -> Case:
        """`case`, or the test is skipped, since the backend may decline it."""
        if case not in self._reasons:
            self._reasons[case] = kit.unsupported(self.backend, case, self.device)
        reason = self._reasons[case]
        if reason is not None:
            pytest.skip(f"{self.backend.description} declines: {reason}")
        return case


@pytest.fixture(scope="session", params=CANDIDATES, ids=lambda candidate: candidate.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    candidate: Candidate = request.param
    if candidate.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Subject(candidate.make(), candidate.device, candidate.threads_show)


def grid(quick: list[Case], slow: list[Case]) -> pytest.MarkDecorator:
    """Parametrises over `quick`, and over `slow` under the mark of that name."""
    marked = [pytest.param(case, marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize("case", [*quick, *marked], ids=str)


EIGHT_BIT = [case for case in cases.QUICK if case.config.code_bits == 8]


@grid(cases.QUICK, cases.SLOW)
def test_query_codes_are_those_of_the_reference(subject: Subject, case: Case) -> None:
    kit.check_query_codes(subject.backend, subject.takes(case), subject.device)


@grid([*cases.EDGES, *cases.HEADS, *cases.LAYOUTS], cases.ALL_HEADS)
def test_the_key_centre_is_that_of_the_reference(subject: Subject, case: Case) -> None:
    kit.check_key_centre(subject.backend, subject.takes(case), subject.device)


@grid([*cases.EDGES, *cases.HEADS, *cases.LAYOUTS, *cases.POLICIES, *cases.EXTREMES, *cases.SAMPLED], cases.ALL_HEADS)
def test_a_layer_as_a_whole_has_the_bits_of_its_phases(subject: Subject, case: Case) -> None:
    kit.check_layer(subject.backend, subject.takes(case), subject.device)


@grid(cases.QUICK, cases.SLOW)
def test_key_codes_are_those_of_the_reference(subject: Subject, case: Case) -> None:
    kit.check_key_codes(subject.backend, subject.takes(case), subject.device)


@grid(cases.QUICK, cases.SLOW)
def test_sink_local_log_sum_exp_is_that_of_float64(subject: Subject, case: Case) -> None:
    kit.check_sink_local_lse(subject.backend, subject.takes(case), subject.device)


@grid(cases.SAMPLED, [])
def test_a_sample_of_the_keys_between_counts_as_in_float64(subject: Subject, case: Case) -> None:
    kit.check_sampled_lse(subject.backend, subject.takes(case), subject.device)


@grid(cases.QUICK, cases.SLOW)
def test_the_same_codes_and_thresholds_give_the_same_selection(subject: Subject, case: Case) -> None:
    kit.check_selection(subject.backend, subject.takes(case), subject.device)


@grid(EIGHT_BIT, cases.SLOW)
def test_extreme_codes_and_ties_give_the_same_selection(subject: Subject, case: Case) -> None:
    kit.check_selection_of_extreme_codes(subject.backend, subject.takes(case), subject.device)


@grid(EIGHT_BIT, cases.SLOW)
def test_what_cannot_be_judged_is_kept(subject: Subject, case: Case) -> None:
    kit.check_selection_of_what_cannot_be_judged(subject.backend, subject.takes(case), subject.device)


@grid(cases.QUICK, cases.SLOW)
def test_output_over_the_selected_blocks_is_as_exact_as_torch(subject: Subject, case: Case) -> None:
    kit.check_compute(subject.backend, subject.takes(case), subject.device)


@grid(cases.QUICK, cases.SLOW)
def test_output_over_all_keys_is_as_exact_as_torch(subject: Subject, case: Case) -> None:
    kit.check_attend_all(subject.backend, subject.takes(case), subject.device)


@grid([*cases.HEADS, *cases.LAYOUTS, *cases.POLICIES, *cases.EXTREMES], [*cases.EDGES, *cases.SLOW])
def test_a_whole_call_is_exact_on_what_it_selects(subject: Subject, case: Case) -> None:
    kit.check_attend(subject.backend, subject.takes(case), subject.device)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(cases.END_TO_END, id="quick"),
        pytest.param(cases.END_TO_END_SLOW, id="long", marks=pytest.mark.slow),
        pytest.param(cases.END_TO_END_OPTIONAL, id="optional", marks=pytest.mark.slow),
    ],
)
def test_end_to_end_decisions_differ_at_the_threshold_only(subject: Subject, chosen: list[Case]) -> None:
    for case in chosen:
        subject.takes(case)
    kit.check_end_to_end(subject.backend, chosen, subject.device)


@grid(cases.CHUNKS, cases.CHUNKS_SLOW)
def test_chunks_change_no_bit(subject: Subject, case: Case) -> None:
    kit.check_chunks(subject.backend, subject.takes(case), subject.device)


@grid(cases.CHUNKS, cases.CHUNKS_SLOW)
def test_kept_codes_change_no_bit(subject: Subject, case: Case) -> None:
    kit.check_appends(subject.backend, subject.takes(case), subject.device)


@grid(cases.PROFILES, cases.PROFILES_SLOW)
def test_a_profile_codes_and_thresholds_give_the_same_selection_in_any_chunks(subject: Subject, case: Case) -> None:
    kit.check_profile_selection(subject.backend, subject.takes(case), subject.device)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param([*cases.PROFILES, cases.END_TO_END[0]], id="quick"),
        pytest.param(cases.PROFILES_SLOW, id="long", marks=pytest.mark.slow),
    ],
)
def test_calls_with_a_profile_change_no_bit_in_chunks_and_select_the_same(subject: Subject, chosen: list[Case]) -> None:
    for case in chosen:
        subject.takes(case)
    kit.check_profile_calls(subject.backend, chosen, subject.device)


@grid(cases.THREADS, [*cases.HEADS, *cases.LAYOUTS, *cases.POLICIES])
def test_threads_change_no_bit(subject: Subject, case: Case) -> None:
    if subject.device != "cpu" or subject.threads_show:
        pytest.skip("no CPU backend, or one whose last bits depend on threads")
    kit.check_threads(subject.backend, subject.takes(case))


@pytest.mark.parametrize("chosen", [cases.RAGGED, cases.RAGGED_LARGE_PAGES], ids=["small pages", "large pages"])
def test_sequences_in_one_pool_do_not_see_each_other(subject: Subject, chosen: list[Case]) -> None:
    for case in chosen:
        subject.takes(case)
    kit.check_ragged_batch(subject.backend, chosen, subject.device)


@grid(cases.NON_FINITE[:2], cases.NON_FINITE[2:])
def test_a_non_finite_key_or_value_shows_where_softmax_shows_it(subject: Subject, case: Case) -> None:
    kit.check_non_finite_keys(subject.backend, subject.takes(case), subject.device)


@grid(cases.NON_FINITE[:2], cases.NON_FINITE[2:])
def test_a_non_finite_query_shows_in_its_row(subject: Subject, case: Case) -> None:
    kit.check_non_finite_queries(subject.backend, subject.takes(case), subject.device)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Any combination of what the grid varies one at a time."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (1, 6), (1, 8)]))
    query_block = draw(st.sampled_from([64, 128]))
    pages = st.sampled_from([None, 32, 64, 96, 128])
    return Case(
        rows=draw(st.integers(1, 200)),
        offset=draw(st.integers(0, 500)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 96, 128, 256])),
        batch=draw(st.integers(1, 2)),
        tau=tuple(draw(st.lists(st.sampled_from([0.0, 0.004, TAU, 0.2, math.inf]), min_size=1, max_size=4))),
        stride=tuple(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3))),
        config=SaleConfig(
            query_block=query_block,
            sink_tokens=32 * draw(st.integers(0, 3)),
            local_tokens=32 * draw(st.integers(0, 5)),
            dense_rows=query_block,
            centre_tokens=64,
            sample_stride=32 * draw(st.integers(0, 3)),
        ),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        inputs=draw(st.sampled_from(["attention", "peaked", "ties"])),
        prompt_end=draw(st.none() | st.integers(700, 3000)),
        page_tokens=draw(pages),
        code_page_tokens=draw(pages),
        spare_tokens=draw(st.sampled_from([0, 1, 45])),
        token_major=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def property_settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        # The backend is made once for all examples, as is meant.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@property_settings(12)
@given(case=random_cases())
def test_phases_of_random_cases(subject: Subject, case: Case) -> None:
    kit.check_phases(subject.backend, subject.takes(case), subject.device)


@pytest.mark.slow
@pytest.mark.timeout(900)
@property_settings(250)
@given(case=random_cases())
def test_phases_of_many_random_cases(subject: Subject, case: Case) -> None:
    kit.check_phases(subject.backend, subject.takes(case), subject.device)


@pytest.mark.slow
@property_settings(60)
@given(case=random_cases())
def test_whole_calls_of_random_cases(subject: Subject, case: Case) -> None:
    # `attend` has the session's centre, the mean of the first keys, and cannot be given the "ties" inputs' own.
    whole = replace(case, inputs="attention" if case.inputs == "ties" else case.inputs)
    kit.check_attend(subject.backend, subject.takes(whole), subject.device)
