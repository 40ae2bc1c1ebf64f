"""The benchmarks of segments run, on KV too small to mean anything, and their bytes are right."""

from __future__ import annotations

from benchmarks import kv_gpu


def test_what_is_handed_over_beside_messages_is_what_comes_in_them() -> None:
    rows = kv_gpu.measure(600, "cpu", tiny=True, traces=None)
    assert [row.passed for row in rows if row.required == "equal"] == [True, True]
    assert len(rows) == 4
