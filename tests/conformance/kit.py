"""The conformance kit: what any attention backend must do as the reference does. `README.md` says how to join.

Every `check_...(backend, case, device)` makes its inputs on the CPU, moves them to `device`, and compares the results
on the CPU with the reference and with float64. It raises AssertionError with the case, the extent and the first place
of a difference.
"""

from tests.conformance.calls import (
    check_appends,
    check_attend,
    check_chunks,
    check_non_finite_keys,
    check_non_finite_queries,
)
from tests.conformance.phases import (
    check_attend_all,
    check_compute,
    check_key_centre,
    check_key_codes,
    check_layer,
    check_phases,
    check_query_codes,
    check_sampled_lse,
    check_selection,
    check_selection_of_extreme_codes,
    check_selection_of_what_cannot_be_judged,
    check_sink_local_lse,
    unsupported,
)
from tests.conformance.pipeline import check_end_to_end, check_ragged_batch, check_threads
from tests.conformance.profiles import check_profile_calls, check_profile_selection

__all__ = [
    "check_appends",
    "check_attend",
    "check_attend_all",
    "check_chunks",
    "check_compute",
    "check_end_to_end",
    "check_key_centre",
    "check_key_codes",
    "check_layer",
    "check_non_finite_keys",
    "check_non_finite_queries",
    "check_phases",
    "check_profile_calls",
    "check_profile_selection",
    "check_query_codes",
    "check_ragged_batch",
    "check_sampled_lse",
    "check_selection",
    "check_selection_of_extreme_codes",
    "check_selection_of_what_cannot_be_judged",
    "check_sink_local_lse",
    "check_threads",
    "unsupported",
]
