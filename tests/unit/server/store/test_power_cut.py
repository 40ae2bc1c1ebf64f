"""A power cut at any moment: what was acknowledged is whole, everything else is absent or found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.server.store.power_cut import RecordingLayer, directory_for_many_files, simulate


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Thousands of small files, on no disk: what a power cut leaves is decided by the simulation."""
    with directory_for_many_files() as directory:
        yield directory


def test_200_power_cuts_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    outcome = simulate(200, tmp_path)
    assert outcome.violations == []
    assert outcome.points == 200
    assert outcome.records_whole == outcome.records_promised > 500


class _NoFileSync(RecordingLayer):
    def fsync(self, descriptor: int) -> None:
        pass


class _NoDirectorySync(RecordingLayer):
    def fsync_directory(self, path: Path) -> None:
        pass


@pytest.mark.parametrize("layer", [_NoFileSync, _NoDirectorySync])
def test_the_simulation_notices_where_a_sync_is_left_out(tmp_path: Path, layer: type[RecordingLayer]) -> None:
    outcome = simulate(20, tmp_path, layer=layer())
    assert outcome.violations


def test_unsynced_files_are_found_damaged_and_never_read_wrong(tmp_path: Path) -> None:
    outcome = simulate(20, tmp_path, layer=_NoFileSync())
    assert outcome.damaged_objects > 20
    assert not [violation for violation in outcome.violations if "read wrong" in violation]
