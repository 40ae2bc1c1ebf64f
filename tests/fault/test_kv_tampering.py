"""No change to KV goes unnoticed, whatever it is and wherever it strikes."""

from __future__ import annotations

from benchmarks.kv_tampering import TRIES, tamper
from tests.support import RunningServer


def test_every_change_to_a_stream_or_a_file_is_caught(tiny_server: RunningServer) -> None:
    tallies = tamper(tiny_server.target)
    assert [tally.unnoticed for tally in tallies] == [[], [], []]
    assert sum(tally.caught for tally in tallies) == TRIES >= 1000
