"""What the hand-over of KV promises, line by line: numbers in, required against measured out.

The limits are here; the modules that measure know none of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.gpu_rows import Row, at_least, at_most, information

if TYPE_CHECKING:
    from benchmarks.kv_inline import Inline
    from benchmarks.kv_shm import Rates
    from benchmarks.kv_stalled import Stall
    from benchmarks.kv_tampering import Tally
    from benchmarks.kv_wire import WireRates

WIRE_SHARE = 0.8
SHARED_MEMORY_SHARE = 0.5
INLINE_RATIO = 1.08
FIRST_LAYER = 1.5
STALLED_MIB = 32.0
STALLED_P99 = 1.10


def wire_rows(rates: Sequence[WireRates]) -> list[Row]:
    """Pull and push against a bare byte stream."""
    return [
        at_least(
            f"{each.direction} over gRPC against a bare byte stream, {each.client} client, chunks of "
            f"{each.chunk_bytes >> 10} KiB",
            WIRE_SHARE,
            None,
            each.ratio,
            gigabytes_per_second={
                "kv": round(each.kv_bytes_per_second / 1e9, 3),
                "bare": round(each.bare_bytes_per_second / 1e9, 3),
            },
        )
        for each in rates
    ]


def published_row(same: bool) -> Row:
    """A client that has nothing but the .proto files."""
    shown = "the same bytes" if same else "other bytes"
    return Row("PullKv read with the published proto alone", "the same bytes", "", shown, same)


def shared_memory_rows(name: str, rates: Rates) -> list[Row]:
    """Pulls and pushes through a segment against memcpy."""
    line = f"pull through shared memory against memcpy, {name}, {rates.checksum}"
    gigabytes = {key: round(getattr(rates, key), 2) for key in ("pull", "push", "push_in_place", "memcpy")}
    pushed = f"{rates.push_in_place_share:.2f}x of bytes that lie there, {rates.push_share:.2f}x of others"
    return [
        at_least(line, SHARED_MEMORY_SHARE, None, rates.pull_share, gigabytes_per_second=gigabytes),
        information("... push through shared memory", pushed),
        information(
            "... the segment's first stream, against memcpy into new memory", f"{rates.fresh / rates.memcpy_fresh:.2f}x"
        ),
    ]


def tampering_rows(tallies: Sequence[Tally]) -> list[Row]:
    """Changes on the way and in files."""
    tried, caught = sum(tally.tried for tally in tallies), sum(tally.caught for tally in tallies)
    by_medium = {tally.medium: f"{tally.caught} of {tally.tried}" for tally in tallies}
    return [
        Row(
            "bytes flipped, truncated, reordered, replayed or dropped in streams and files: caught",
            "all of 1000 or more",
            "",
            f"{caught} of {tried}",
            caught == tried >= 1000,
            {"media": by_medium, "unnoticed": [note for tally in tallies for note in tally.unnoticed]},
        )
    ]


def stalled_rows(seen: Stall) -> list[Row]:
    """A reader that stops reading."""
    from benchmarks.kv_stalled import p99

    counts = len(seen.stalled_seconds), len(seen.quiet_seconds)
    asked = seen.session_bytes / 2**20
    return [
        at_most(
            f"a reader of {asked:.0f} MiB stalls for {seen.longest_stall_seconds:.0f} s: MiB held on the server",
            STALLED_MIB,
            None,
            seen.held_bytes / 2**20,
            "",
            asked_bytes=seen.session_bytes,
        ),
        at_most(
            f"... another client's p99 against that without it ({counts[0]} and {counts[1]} requests)",
            STALLED_P99,
            None,
            seen.p99_ratio,
            "x",
            milliseconds={
                "p99": [round(1e3 * p99(seen.stalled_seconds), 2), round(1e3 * p99(seen.quiet_seconds), 2)],
                "median": [
                    round(1e3 * statistics.median(seen.stalled_seconds), 2),
                    round(1e3 * statistics.median(seen.quiet_seconds), 2),
                ],
            },
        ),
        Row("... and then gets the rest", "yes", "", "yes" if seen.finished else "no", seen.finished),
    ]


def inline_rows(seen: Inline, tokens: int) -> list[Row]:
    """KV that comes along with a prefill."""
    layer, chunk = seen.layer_seconds, seen.layer_seconds * seen.num_layers
    first = 1e3 * seen.first_layer_seconds
    shown = f"{first:.0f} ms; a layer takes {1e3 * layer:.0f} ms, the chunk {1e3 * chunk:.0f} ms"
    return [
        at_most(
            f"prefill of {tokens} tokens with inline KV over prefill alone, median of {len(seen.runs)} pairs",
            INLINE_RATIO,
            None,
            seen.ratio,
            "x",
            seconds={"with": [run.seconds for run in seen.runs], "alone": seen.alone_seconds},
        ),
        at_most(
            "... first layer at the client over the first chunk's time by layer",
            FIRST_LAYER,
            None,
            seen.first_layer_seconds / layer,
            "x",
            milliseconds=shown,
            accepted_milliseconds=round(1e3 * statistics.median(run.accepted_seconds for run in seen.runs), 1),
        ),
        at_most(
            "... first layer at the client over the first chunk's time, all layers",
            FIRST_LAYER,
            None,
            seen.first_layer_seconds / chunk,
            "x",
        ),
        Row(
            "... is what a pull brings, in every bit",
            "yes",
            "",
            "yes" if seen.same_kv else "no",
            seen.same_kv,
        ),
    ]
