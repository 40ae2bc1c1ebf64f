"""`make check-kv`: what KV caches as a product promise, measured on a CPU against real server processes.

    python -m benchmarks.check_kv [--only PART ...] [--kills N] [--json FILE]

Prints every promise with required and measured, and fails where one falls short. A whole run is written to
`benchmarks/results/kv-cpu.json`, some parts of it to `kv-cpu-partial.json`, which git ignores. Times mean little where
anything else runs on the machine. What cannot be measured makes its line fail.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import kv_handover_rows, kv_session_rows
from benchmarks.gpu_rows import Row, print_rows, write_rows
from benchmarks.report import ROOT, warn_if_busy
from benchmarks.served import ServedModel, serving

RESULTS = ROOT / "benchmarks" / "results" / "kv-cpu.json"
PREFIX_TOKENS = 6144
#: Less than a page: of an equal prompt the last page is computed again, so that there are logits.
TAIL_TOKENS = 64
FORK_LENGTHS = (1024, 2048, 4096, 7168)


@dataclass(frozen=True)
class Plan:
    """How much of everything; the defaults are what is promised."""

    kills: int = 100
    crash_points: int = 1000
    tampered: int = 1002
    sessions: int = 1000
    fork_rounds: int = 300
    restored_sessions: int = 3
    inline_rounds: int = 5


def wire(plan: Plan) -> Iterator[Row]:
    """Pull and push against a bare grpcio byte stream, and a foreign reader."""
    from benchmarks import kv_published, kv_wire

    yield from kv_handover_rows.wire_rows(kv_wire.measure())
    with _tiny_server() as served:
        session = served.client.prefill(_tiny_tokens(700)).session_id
        expected = served.client.pull_kv(session).buffer
        found = kv_published.pull(served.client.target, session, chunk_bytes=1 << 16)
    yield kv_handover_rows.published_row(found.tobytes() == expected.tobytes())


def shared_memory(plan: Plan) -> Iterator[Row]:
    """Pulls and pushes through segments against memcpy."""
    from benchmarks import kv_shm

    for name, (size, fragmented) in kv_shm.SIZES.items():
        yield from kv_handover_rows.shared_memory_rows(name, kv_shm.measure(size, fragmented=fragmented))


def tampering(plan: Plan) -> Iterator[Row]:
    """Changed streams and files."""
    from benchmarks import kv_tampering

    with _tiny_server() as served:
        yield from kv_handover_rows.tampering_rows(kv_tampering.tamper(served.client.target, plan.tampered))


def prefix(plan: Plan) -> Iterator[Row]:
    """Prefixes that are there already, forks, deletes."""
    from benchmarks import kv_prefix

    with serving() as served:
        tokenizer = served.client.tokenizer()
        reuses = kv_prefix.measure_reuse(served, kv_prefix.texts(PREFIX_TOKENS, tokenizer), TAIL_TOKENS)
        yield from kv_session_rows.reuse_rows(reuses, PREFIX_TOKENS)
        tokens = kv_prefix.texts(max(FORK_LENGTHS), tokenizer)[0]
        yield from kv_session_rows.fork_rows(kv_prefix.measure_forks(served, tokens, FORK_LENGTHS, plan.fork_rounds))


def tenants(plan: Plan) -> Iterator[Row]:
    """Two tenants with equal prompts, in memory and on disk."""
    from benchmarks import kv_prefix, kv_tenants

    with kv_tenants.tenants() as served:
        prompts = kv_prefix.texts(PREFIX_TOKENS + TAIL_TOKENS, served[kv_tenants.TENANTS[0]].client.tokenizer())
        yield from kv_session_rows.tenant_rows(kv_tenants.measure(served, prompts))
    with TemporaryDirectory() as folder:
        yield kv_session_rows.tenant_restart_row(*kv_tenants.reused_across_restart(prompts[0], Path(folder)))


def memory(plan: Plan) -> Iterator[Row]:
    """Many sessions of all kinds, and what is left of them."""
    from benchmarks import kv_mixed

    yield from kv_session_rows.mixed_rows(kv_mixed.measure(plan.sessions))


def stalled(plan: Plan) -> Iterator[Row]:
    """A reader that stops reading."""
    from benchmarks import kv_stalled
    from tests.support import save_tiny_llama

    with TemporaryDirectory() as folder:
        # 64 KiB a token: little to compute, much to send.
        shape = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
        model = save_tiny_llama(Path(folder), **shape, max_position_embeddings=4608)
        settings = ("--model", str(model), "--dtype", "float32", "--kv-memory", "1G", "--threads", "1")
        with serving(*settings) as served:
            yield from kv_handover_rows.stalled_rows(kv_stalled.measure(served, _tiny_tokens(4400)))


def restore(plan: Plan) -> Iterator[Row]:
    """Sessions back from disk."""
    from benchmarks import kv_restore

    prompts = kv_restore.default_prompts(plan.restored_sessions)
    with TemporaryDirectory() as folder:
        found = kv_restore.measure(prompts, Path(folder))
    yield from kv_session_rows.restore_rows(found, kv_restore.TOKENS, kv_restore.ANSWER_TOKENS)


def crash(plan: Plan) -> Iterator[Row]:
    """Simulated power cuts."""
    from benchmarks import kv_crash

    yield from kv_session_rows.crash_rows(kv_crash.count(plan.crash_points))


def kill9(plan: Plan) -> Iterator[Row]:
    """Real kills."""
    from benchmarks import kv_kill9

    yield from kv_session_rows.kill_rows(kv_kill9.measure(plan.kills), Plan.kills)


def inline(plan: Plan) -> Iterator[Row]:
    """KV that comes along with a prefill."""
    from benchmarks import kv_inline
    from benchmarks.texts import english_reference

    with serving() as served:
        tokens = english_reference(kv_inline.TOKENS, served.client.tokenizer())
        yield from kv_handover_rows.inline_rows(
            kv_inline.measure(served, tokens, rounds=plan.inline_rounds), len(tokens)
        )


PARTS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        wire,
        shared_memory,
        tampering,
        prefix,
        tenants,
        memory,
        stalled,
        restore,
        crash,
        kill9,
        inline,
    )
}


@contextmanager
def _tiny_server() -> Iterator[ServedModel]:
    from tests.support import save_tiny_llama

    with TemporaryDirectory() as folder:
        model = save_tiny_llama(Path(folder))
        with serving("--model", str(model), "--dtype", "float32", "--kv-memory", "256M") as served:
            yield served


def _tiny_tokens(count: int) -> list[int]:
    from tests.support import tokens_of

    return tokens_of(count)


def run_part(name: str, plan: Plan) -> list[Row]:
    """The lines of one part; where it broke off, those before it and one that says so."""
    started = time.perf_counter()
    rows: list[Row] = []
    try:
        rows.extend(PARTS[name](plan))
    except (Exception, SystemExit) as error:  # the other parts are worth having
        traceback.print_exc()
        rows.append(Row(name, "is measured", "", f"failed: {str(error) or type(error).__name__}", False))
    print(f"     {name} took {time.perf_counter() - started:.0f} s", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument("--kills", type=int, default=Plan.kills, help="kill -9 so often; fewer than promised fail")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(arguments)
    plan = Plan(kills=options.kills)
    whole = options.only is None and plan == Plan()
    file = options.json or (RESULTS if whole else RESULTS.with_name("kv-cpu-partial.json"))
    command = " ".join(["python -m benchmarks.check_kv", *(sys.argv[1:] if arguments is None else arguments)])
    warn_if_busy()
    rows: list[Row] = []
    for name in options.only or PARTS:
        rows += (part := run_part(name, plan))
        print_rows(part)
        write_rows(file, rows, command)  # a run that is cut short leaves what it has
    required = [row for row in rows if row.required]
    failed = [row for row in required if not row.passed]
    if failed:
        print_rows(failed)
    print(f"\n{len(required) - len(failed)} of {len(required)} lines hold; written to {file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
