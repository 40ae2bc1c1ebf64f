"""Many sessions of every kind at once; afterwards the server must be as it was before.

    python -m benchmarks.kv_mixed [--sessions 1000]

A small model of random weights: what is looked at is who holds what, not how fast it is computed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch

from benchmarks.served import ServedModel, ServerProcess
from sale_prefill_client import Client, PrefillAccepted
from sale_prefill_client.errors import OverloadedError, SessionNotFoundError
from sale_prefill_client.options import InterruptPolicy
from tests.support import TINY_VOCABULARY, save_tiny_llama

#: So deep that a long prompt takes many steps, and is there to be cancelled.
_MODEL = {"num_hidden_layers": 16, "hidden_size": 128, "intermediate_size": 256}
_SERVER = ("--threads", "1", "--dtype", "float32", "--chunk-tokens", "256", "--log-level", "error")
#: Less than the sessions want at times, so that pages are taken back from what is kept, and requests refused.
_KV_MEMORY = "96M"
_LONG_TOKENS = 2500
_SHORT_LEASE_SECONDS = 0.5
#: Longest that a caller waits before it leaves a prefill.
_PATIENCE_SECONDS = 0.4
_SETTLE_SECONDS = 60.0
_WARM_UP_SESSIONS = 100
_STAYING = "stays"


@dataclass(frozen=True)
class Holdings:
    """What a server has, when nobody asks anything of it."""

    used_bytes: int
    sessions: int
    threads: int
    descriptors: int


@dataclass(frozen=True)
class Outcome:
    """A run.

    Attributes:
        before, after: the server around it; every client is gone in both, and one session stays from before to after.
        same_answer: that session's answer is the same after as before.
        kept_bytes: KV that no session holds any more, kept for prompts that begin the same.
        kinds: sessions by what was done with them.
        refused: requests for which there was no room.
        cancelled: prefills that the server stopped before their end.
        seconds: how long it took.
    """

    before: Holdings
    after: Holdings
    same_answer: bool
    kept_bytes: int
    kinds: dict[str, int]
    refused: int
    cancelled: int
    seconds: float


class Worker:
    """One client thread; each method is one kind of session's life.

    Args:
        target: the server.
        seed: of its random choices.
        prefixes: token ids that long prompts begin with.
    """

    def __init__(self, target: str, seed: int, prefixes: Sequence[list[int]]) -> None:
        self._client = Client(target)
        self._random = random.Random(seed)
        self._prefixes = prefixes
        self.kinds: Counter[str] = Counter()
        self.refused = 0

    def live(self, sessions: int) -> None:
        """So many sessions, one after the other; then the connection is closed."""
        kinds: list[Callable[[], None]] = [
            self.short,
            self.long,
            self.appended,
            self.forked,
            self.pulled,
            self.cancelled,
            self.cancelled_and_freed,
            self.deleted_while_busy,
            self.expired,
            self.released,
        ]
        with self._client:
            for _ in range(sessions):
                kind = self._random.choice(kinds)
                self.kinds[kind.__name__] += 1
                try:
                    kind()
                except OverloadedError:
                    self.refused += 1

    def short(self) -> None:
        """Prefilled, answered, deleted."""
        with self._session(self._tokens(self._random.randint(1, 200))) as session:
            self._client.generate(session, max_new_tokens=self._random.randint(1, 8), ignore_eos=True)

    def long(self) -> None:
        """A prompt that may begin like others."""
        with self._session(self._long_prompt()):
            pass

    def appended(self) -> None:
        """Tokens are added, with and without an answer."""
        with self._session(self._long_prompt()) as session:
            for _ in range(self._random.randint(1, 3)):
                self._client.prefill(self._tokens(self._random.randint(1, 300)), session_id=session)
            self._client.generate(session, self._tokens(5), max_new_tokens=8, ignore_eos=True)

    def forked(self) -> None:
        """Parent and child go on apart, and end in any order."""
        with self._session(self._long_prompt()) as parent:
            tokens = self._client.get_session(parent).num_tokens
            child = self._client.fork_session(parent, num_tokens=self._random.randint(1, tokens)).session_id
            with self._deleted(child):
                self._client.generate(child, max_new_tokens=8, ignore_eos=True)
                self._client.generate(parent, max_new_tokens=8, ignore_eos=True)

    def pulled(self) -> None:
        """Its KV goes to the caller, all of it or until the caller has enough."""
        with self._session(self._long_prompt()) as session:
            self._client.pull_kv(session, chunk_bytes=1 << 18)

    def cancelled(self) -> None:
        """The caller leaves a prefill; what was computed stays until its lease ends, or goes on."""
        session = self._left("keep")
        if self._random.random() < 0.5 and self._idle(session):
            with self._deleted(session):
                self._client.generate(session, self._tokens(3), max_new_tokens=2, ignore_eos=True)

    def cancelled_and_freed(self) -> None:
        """The caller leaves a prefill and wants nothing kept."""
        self._left("free")

    def deleted_while_busy(self) -> None:
        """Somebody deletes it while it is computed."""
        with closing(self._client.prefill_events(self._long_prompt(), lease_seconds=60)) as events:
            session = cast(PrefillAccepted, next(events)).session_id
            time.sleep(self._random.uniform(0.0, _PATIENCE_SECONDS))
            self._client.delete_session(session, force=True, allow_missing=True)

    def expired(self) -> None:
        """Left to its lease."""
        self._client.prefill(self._long_prompt(), lease_seconds=_SHORT_LEASE_SECONDS)

    def released(self) -> None:
        """Freed with the request that made it."""
        self._client.prefill(self._long_prompt(), lease_seconds=0)

    def _left(self, on_interrupt: InterruptPolicy) -> str:
        events = self._client.prefill_events(
            self._long_prompt(), lease_seconds=_SHORT_LEASE_SECONDS, on_interrupt=on_interrupt
        )
        with closing(events):  # closing cancels
            session = cast(PrefillAccepted, next(events)).session_id
            time.sleep(self._random.uniform(0.0, _PATIENCE_SECONDS))
        return session

    def _idle(self, session: str) -> bool:
        """Waits until the request that was cancelled has let the session go; False where it is no more."""
        try:
            while self._client.get_session(session).state == "busy":
                time.sleep(0.01)
        except SessionNotFoundError:
            return False
        return True

    def _long_prompt(self) -> list[int]:
        prefix = self._random.choice(self._prefixes)
        return prefix[: self._random.randint(1, len(prefix))] + self._tokens(self._random.randint(1, 400))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(3, TINY_VOCABULARY) for _ in range(count)]

    @contextmanager
    def _session(self, tokens: list[int]) -> Iterator[str]:
        with self._deleted(self._client.prefill(tokens, lease_seconds=60).session_id) as session:
            yield session

    @contextmanager
    def _deleted(self, session: str) -> Iterator[str]:
        try:
            yield session
        except SessionNotFoundError:  # its lease was as short as was meant
            pass
        finally:
            self._client.delete_session(session, allow_missing=True, force=True)


def holdings(served: ServedModel) -> Holdings:
    """What the server has now."""
    process = Path(f"/proc/{served.process_id}")
    return Holdings(
        int(served.metric("sale_prefill_kv_used_bytes", tier="device")),
        int(served.metric("sale_prefill_sessions")),
        len(list((process / "task").iterdir())),
        len(list((process / "fd").iterdir())),
    )


def settled(served: ServedModel, wanted: Holdings | None = None) -> Holdings:
    """What the server has once every lease is over: `wanted` where it gets there, or what it stays at.

    Without `wanted`: as soon as just the one session is left that stays, and nothing changes any more.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    now = holdings(served)
    while time.monotonic() < deadline:
        time.sleep(1.0)
        last, now = now, holdings(served)
        if now == wanted or (wanted is None and now == last and now.sessions == 1):
            break
    return now


def measure(sessions: int = 1000, threads: int = 4, seed: int = 1) -> Outcome:
    """Lets `sessions` sessions live, on `threads` connections at once.

    Some live before that, on more connections: a process takes threads and descriptors that it keeps when it first has
    so much to do at once.
    """
    generator = random.Random(seed)
    prefixes = [[generator.randrange(3, TINY_VOCABULARY) for _ in range(_LONG_TOKENS)] for _ in range(8)]
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = save_tiny_llama(Path(folder), **_MODEL)
        process = ServerProcess("--model", str(model), "--kv-memory", _KV_MEMORY, *_SERVER)
        try:
            served = ServedModel(cast(Client, None), process.process_id, process.metrics_url)
            _run(process.target, _WARM_UP_SESSIONS, 3 * threads, seed + 1000, prefixes)
            answer = _answer_of_staying(process.target, prefixes[0])
            before = settled(served)
            cancelled_before = _cancelled(served)
            started = time.perf_counter()
            workers = _run(process.target, sessions, threads, seed, prefixes)
            seconds = time.perf_counter() - started
            after = settled(served, before)
            same_answer = _answer_of_staying(process.target, prefixes[0]) == answer
            cancelled = _cancelled(served) - cancelled_before
            kept_bytes = int(served.metric("sale_prefill_kv_kept_bytes", tier="device"))
        finally:
            process.stop()
    kinds = sum((worker.kinds for worker in workers), Counter[str]())
    refused = sum(worker.refused for worker in workers)
    return Outcome(before, after, same_answer, kept_bytes, dict(kinds), refused, cancelled, seconds)


def _answer_of_staying(target: str, tokens: list[int]) -> list[int]:
    """What the session that stays says next; a fork says it, so that the session is left as it is."""
    with Client(target) as client:
        if not any(session.session_id == _STAYING for session in client.list_sessions()):
            client.prefill(tokens, session_id=_STAYING, lease_seconds=3600)
        child = client.fork_session(_STAYING).session_id
        answer = client.generate(child, max_new_tokens=16, ignore_eos=True).token_ids
        client.delete_session(child)
    return answer


def _cancelled(served: ServedModel) -> int:
    return int(served.metric("sale_prefill_requests_total", kind="prefill", outcome="cancelled"))


def _run(target: str, sessions: int, threads: int, seed: int, prefixes: Sequence[list[int]]) -> list[Worker]:
    workers = [Worker(target, seed + index, prefixes) for index in range(threads)]
    shares = [sessions // threads + (index < sessions % threads) for index in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(Worker.live, workers, shares))
    return workers


def main() -> None:
    """Prints the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    print(measure(arguments.sessions, arguments.threads))


if __name__ == "__main__":
    main()
