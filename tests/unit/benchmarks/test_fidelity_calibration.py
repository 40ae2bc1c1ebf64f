"""Densities of two calibrations at one error are compared between measured points, never past them."""

from __future__ import annotations

import pytest

from benchmarks.fidelity_calibration import Point, density_at

POINTS = [Point(0.2, 0.4), Point(0.6, 0.1), Point(0.4, 0.2)]


@pytest.mark.parametrize(
    ("p99_error", "density"), [(0.1, 0.6), (0.2, 0.4), (0.4, 0.2), (0.1 * 2**0.5, 0.5), (0.2 * 2**0.25, 0.35)]
)
def test_between_neighbours_density_is_linear_in_the_errors_logarithm(p99_error: float, density: float) -> None:
    assert density_at(POINTS, p99_error) == pytest.approx(density)


@pytest.mark.parametrize("p99_error", [0.09, 0.41])
def test_an_error_that_no_budget_reached_is_refused(p99_error: float) -> None:
    with pytest.raises(ValueError, match=r"outside of what was tried"):
        density_at(POINTS, p99_error)
