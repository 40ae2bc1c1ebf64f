"""Power cuts at random moments of random workloads on the disk tier, counted.

python -m benchmarks.kv_crash [--points 1000] [--seed 1]
"""

from __future__ import annotations

import argparse

from tests.unit.server.store.power_cut import Outcome, directory_for_many_files, simulate

#: Each workload is cut at this many moments.
_POINTS_PER_WORKLOAD = 200


def count(points: int, seed: int = 1) -> Outcome:
    """Tries `points` moments, over as many workloads as that takes.

    `points` of the result is how many were tried, `records_whole` of `records_promised` were found whole, and
    `violations` says what must not be: lost promises, records without their blocks, bytes read wrong.
    """
    total = Outcome()
    with directory_for_many_files() as directory:
        while total.points < points:
            workload = directory / str(total.points)
            workload.mkdir()
            part = simulate(min(_POINTS_PER_WORKLOAD, points - total.points), workload, seed=seed + total.points)
            total.points += part.points
            total.records_promised += part.records_promised
            total.records_whole += part.records_whole
            total.damaged_objects += part.damaged_objects
            total.violations += part.violations
    return total


def main() -> int:
    """Prints the counts; fails where there is a violation."""
    parser = argparse.ArgumentParser(description="Power cuts at random moments of random workloads on the disk tier.")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    outcome = count(arguments.points, arguments.seed)
    print(
        f"{outcome.points} power cuts: {outcome.records_whole} of {outcome.records_promised} promised records whole, "
        f"{outcome.damaged_objects} damaged objects found out, {len(outcome.violations)} violations"
    )
    for violation in outcome.violations[:20]:
        print(f"  {violation}")
    return bool(outcome.violations)


if __name__ == "__main__":
    raise SystemExit(main())
