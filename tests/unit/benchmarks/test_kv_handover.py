"""What is measured of the hand-over of KV, on a tiny model: every measurement sees what it is there to see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import check_kv, kv_handover_rows, kv_inline, kv_published, kv_stalled
from benchmarks.served import ServedModel
from sale_prefill_client import Client
from tests.support import RunningServer, tokens_of


@pytest.fixture
def served(tiny_server: RunningServer) -> Iterator[ServedModel]:
    with Client(tiny_server.target) as client:
        yield ServedModel(client, os.getpid(), tiny_server.metrics_url)


def test_a_reader_with_the_published_files_alone_gets_the_same_bytes(served: ServedModel) -> None:
    session = served.client.prefill(tokens_of(300)).session_id
    found = kv_published.pull(served.client.target, session, chunk_bytes=1 << 14)
    assert found.tobytes() == served.client.pull_kv(session).buffer.tobytes()
    served.client.delete_session(session)


def test_kv_comes_along_and_the_first_layer_before_the_rest(served: ServedModel) -> None:
    before = [session.session_id for session in served.client.list_sessions()]
    seen = kv_inline.measure(served, tokens_of(1200), chunk_tokens=512, rounds=2)
    assert (len(seen.runs), len(seen.alone_seconds), seen.num_layers) == (2, 2, 2)
    assert seen.same_kv
    for run in seen.runs:
        assert 0 < run.accepted_seconds < run.first_layer_seconds < run.first_chunk_seconds < run.seconds
    assert [session.session_id for session in served.client.list_sessions()] == before


def test_a_stalled_reader_and_its_neighbour_are_watched(served: ServedModel) -> None:
    seen = kv_stalled.measure(served, tokens_of(2000), long_seconds=1.0, block_seconds=0.3, pairs=2)
    assert seen.session_bytes == 2000 * 2 * 2 * 2 * 16 * 4
    assert seen.longest_stall_seconds >= 1.0
    assert seen.finished
    assert min(len(seen.stalled_seconds), len(seen.quiet_seconds)) > 10


def test_a_reader_that_holds_too_much_or_slows_others_falls_short() -> None:
    seen = kv_stalled.Stall(2**28, 60.0, 33 * 2**20, [0.001] * 200, [0.0012] * 200)
    assert [row.passed for row in kv_handover_rows.stalled_rows(seen)] == [False, False, True]


def test_what_cannot_be_measured_fails_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: check_kv.Plan) -> Iterator[kv_handover_rows.Row]:
        yield kv_handover_rows.published_row(True)
        raise ModuleNotFoundError("No module named 'benchmarks.kv_lost'")

    monkeypatch.setitem(check_kv.PARTS, "wire", broken)
    first, last = check_kv.run_part("wire", check_kv.Plan())
    assert first.passed
    assert (last.passed, last.measured) == (False, "failed: No module named 'benchmarks.kv_lost'")


def test_some_parts_are_no_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(check_kv.PARTS, "wire", lambda _: iter([kv_handover_rows.published_row(True)]))
    monkeypatch.setattr(check_kv, "RESULTS", tmp_path / "kv-cpu.json")
    assert check_kv.main(["--only", "wire"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["kv-cpu-partial.json"]
