"""What kept sessions promise, line by line: numbers in, required against measured out.

The limits are here; the modules that measure know none of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.gpu_rows import Row, at_least, at_most

if TYPE_CHECKING:
    from benchmarks.kv_kill9 import Outcome as Kills
    from benchmarks.kv_mixed import Outcome as Mixed
    from benchmarks.kv_prefix import ForkTimes, Reuse
    from benchmarks.kv_restore import Restored
    from benchmarks.kv_tenants import Round
    from tests.unit.server.store.power_cut import Outcome as PowerCuts

PREFIX_SPEEDUP = 20.0
#: Median of the longest session over that of the shortest, which holds a seventh of its tokens. A growth with the
#: tokens would show as 7; what remains is the scatter of calls of a millisecond or two.
CONSTANT_TIME = 1.5
#: Another tenant's first prefill against nobody's before: reuse would make it `PREFIX_SPEEDUP` times as fast, noise by
#: a tenth or two either way.
NO_SPEEDUP = 1.25
RESTORE_SPEEDUP = 10.0
READY_SECONDS = 10.0


def reuse_rows(reuses: Sequence[Reuse], prefix_tokens: int) -> list[Row]:
    """Second requests with a prefix."""
    speedup = statistics.median(reuse.speedup for reuse in reuses)
    taken = {reuse.prefix_tokens for reuse in reuses}
    counted = all(reuse.counted["prefix"] == reuse.prefix_tokens for reuse in reuses)
    same = sum(reuse.same_logits for reuse in reuses)
    seconds = [[round(reuse.first_seconds, 3), round(reuse.second_seconds, 3)] for reuse in reuses]
    return [
        at_least(
            f"shared prefix of {prefix_tokens} tokens: second prefill, median of {len(reuses)} prefixes",
            PREFIX_SPEEDUP,
            None,
            speedup,
            seconds=seconds,
        ),
        Row(
            "... tokens taken from another session, by report and by counter",
            f"{prefix_tokens}, the same",
            "",
            f"{', '.join(map(str, sorted(taken)))}, {'the same' if counted else 'not the same'}",
            taken == {prefix_tokens} and counted,
        ),
        Row(
            "... the second prompt's logits are those without reuse, in every bit",
            f"{len(reuses)} of {len(reuses)}",
            "",
            f"{same} of {len(reuses)}",
            same == len(reuses),
        ),
    ]


def fork_rows(times: ForkTimes) -> list[Row]:
    """Forks and deletes by length."""
    rows = []
    for name, seconds in (("fork", times.fork), ("delete of a fork", times.delete)):
        medians = {tokens: round(1e3 * statistics.median(values), 3) for tokens, values in seconds.items()}
        rows.append(
            at_most(
                f"{name}: {max(seconds)} tokens over {min(seconds)}, medians of {len(seconds[min(seconds)])}",
                CONSTANT_TIME,
                None,
                times.growth(seconds),
                "x",
                milliseconds_by_tokens=medians,
            )
        )
    return rows


def tenant_rows(rounds: Sequence[Round]) -> list[Row]:
    """Equal prompts of two tenants."""
    from benchmarks.kv_tenants import speedups

    own, other = speedups(rounds)
    reused = sum(each.other_reused_tokens + each.other_counted_tokens for each in rounds)
    return [
        at_most(
            "equal prompt of another tenant: how much faster than nobody's before, median",
            NO_SPEEDUP,
            None,
            other,
            "x",
            seconds=[[round(each.cold_seconds, 3), round(each.other_seconds, 3)] for each in rounds],
        ),
        at_least("... the same tenant's own second time", PREFIX_SPEEDUP, None, own),
        Row(
            "... tokens that the other tenant did not compute, by reports and counters",
            "0",
            "",
            str(reused),
            not reused,
        ),
    ]


def tenant_restart_row(own_tokens: int, other_tokens: int) -> Row:
    """What each tenant finds on disk; the first one had the prompt before."""
    return Row(
        "after a restart, tokens from disk: tenant that had the prompt, other tenant",
        "some, 0",
        "",
        f"{own_tokens}, {other_tokens}",
        own_tokens > 0 and other_tokens == 0,
    )


def mixed_rows(outcome: Mixed) -> list[Row]:
    """What is left after many sessions."""
    before, after, total = outcome.before, outcome.after, sum(outcome.kinds.values())
    line = f"KV bytes in use after {total} mixed sessions"
    details = {"kinds": outcome.kinds, "refused": outcome.refused, "seconds": round(outcome.seconds, 1)}
    return [
        Row(
            line,
            f"{before.used_bytes}, the start's",
            "",
            f"{after.used_bytes} ({outcome.kept_bytes} kept for prefixes)",
            after.used_bytes == before.used_bytes and total >= 1000,
            details,
        ),
        Row(
            "... sessions, threads, file descriptors",
            f"{before.sessions}, {before.threads}, {before.descriptors}",
            "",
            f"{after.sessions}, {after.threads}, {after.descriptors}",
            (after.sessions, after.threads, after.descriptors) == (before.sessions, before.threads, before.descriptors),
        ),
        Row(
            "... prefills cancelled on their way; the session that stayed answers as before",
            "some, the same",
            "",
            f"{outcome.cancelled}, {'the same' if outcome.same_answer else 'otherwise'}",
            outcome.cancelled > 0 and outcome.same_answer,
        ),
    ]


def restore_rows(found: Sequence[Restored], tokens: int, answer_tokens: int) -> list[Row]:
    """Sessions back from disk."""
    back = [each.restored_tokens for each in found]
    whole = all(each.restored_tokens >= tokens and not each.computed_tokens and each.tier == "disk" for each in found)
    same = [each.same_tokens for each in found]
    return [
        at_least(
            f"{tokens} tokens back from disk after a restart, first token included, against computing, median",
            RESTORE_SPEEDUP,
            None,
            statistics.median(each.speedup for each in found),
            seconds=[[round(each.recompute_seconds, 3), round(each.first_token_seconds, 3)] for each in found],
            next_token_seconds=[round(each.next_token_seconds, 4) for each in found],
        ),
        Row("... tokens read back, none computed", f"{tokens} each", "", ", ".join(map(str, back)), whole),
        Row(
            "... next tokens are those of a session that never left",
            f"{answer_tokens} each",
            "",
            ", ".join(map(str, same)),
            set(same) == {answer_tokens},
        ),
    ]


def crash_rows(outcome: PowerCuts) -> list[Row]:
    """Simulated power cuts."""
    return [
        Row(
            "simulated crash points: every acknowledged record whole, the rest detected",
            "all of 1000 or more",
            "",
            f"{outcome.points} points, {len(outcome.violations)} violations; {outcome.records_whole} of "
            f"{outcome.records_promised} promised records whole",
            outcome.points >= 1000 and not outcome.violations and outcome.records_whole == outcome.records_promised,
            {"damaged_objects_found": outcome.damaged_objects, "violations": outcome.violations[:20]},
        )
    ]


def kill_rows(outcome: Kills, required_kills: int) -> list[Row]:
    """kill -9 under load."""
    wrong = f"{outcome.lost} lost, {outcome.corrupt} corrupt"
    slowest = max(outcome.ready_seconds)
    return [
        Row(
            f"{outcome.kills} times kill -9 under load: acknowledged sessions",
            f"none lost, none corrupt; {required_kills} kills",
            "",
            f"{wrong}; {outcome.checked} looked for, {outcome.acknowledged} acknowledged",
            outcome.faultless and outcome.checked > 0 and outcome.kills >= required_kills,
            {
                "resurrected": outcome.resurrected,
                "strangers": outcome.strangers,
                "weaker": outcome.weaker,
                "notes": outcome.notes[:50],
            },
        ),
        at_most(
            "... restart to ready, slowest",
            READY_SECONDS,
            None,
            slowest,
            " s",
            median_seconds=round(statistics.median(outcome.ready_seconds), 2),
        ),
    ]
