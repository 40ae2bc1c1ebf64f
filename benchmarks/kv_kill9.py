"""A server killed (SIGKILL) at random moments under load: what it has acknowledged must be there afterwards, and right.

    python -m benchmarks.kv_kill9 [--kills 100]

Client threads create, extend, decode, fork and delete sessions, each its own. What a response said to be durable is
acknowledged; a request without an answer may have happened or not, but only as a whole. After each restart every
session is looked at, and its next tokens are compared with those of a server that computed them afresh.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.kv_kill9_clients import Known, Owner
from benchmarks.served import ServerProcess
from sale_prefill_client import Client, Session, token_digest
from sale_prefill_client.errors import SalePrefillError
from tests.support import TINY_VOCABULARY, save_tiny_llama

_MODEL = {"num_hidden_layers": 4, "hidden_size": 64}
_SERVER = ("--threads", "1", "--dtype", "float32", "--attention", "dense", "--log-level", "error")
#: Less than all sessions need, so that some have left the device when the server is killed.
_KV_MEMORY = "24M"
_ANSWER_TOKENS = 4
#: Logarithms of probabilities, float32, of KV that was computed in other pieces.
_LOGPROB_TOLERANCE = 1e-3
_LOAD_SECONDS = (0.05, 1.5)


@dataclass
class Outcome:
    """What was counted over all restarts.

    Attributes:
        kills: how many.
        acknowledged: responses that said a session to be durable.
        weaker: responses that came without the durability that was asked for.
        checked: acknowledged sessions looked for after restarts.
        lost: of them, those that were not there, or with less than was acknowledged.
        corrupt: sessions of tokens that nobody sent, or that go on otherwise than they must.
        resurrected: sessions that were there although a delete was acknowledged.
        strangers: sessions that nobody made, or that were to survive nothing.
        ready_seconds: of each restart.
        notes: what went wrong, in words.
    """

    kills: int = 0
    acknowledged: int = 0
    weaker: int = 0
    checked: int = 0
    lost: int = 0
    corrupt: int = 0
    resurrected: int = 0
    strangers: int = 0
    ready_seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def faultless(self) -> bool:
        """Nothing went wrong."""
        return not (self.weaker or self.lost or self.corrupt or self.resurrected or self.strangers)


class Reference:
    """A server of the same model without tiers, and what it says of token ids; each asked for once.

    Args:
        target: its gRPC target.
    """

    def __init__(self, target: str) -> None:
        self._client = Client(target)
        self._known: dict[tuple[bytes, int], tuple[list[int], list[float]]] = {}

    def answer(self, tokens: list[int], count: int = _ANSWER_TOKENS) -> tuple[list[int], list[float]]:
        """The next `count` greedy tokens, and their logarithms of probabilities."""
        key = (token_digest(tokens), count)
        if key not in self._known:
            session = self._client.prefill(tokens, lease_seconds=60, prefix_reuse=False).session_id
            self._known[key] = answer_of(self._client, session, count)
            self._client.delete_session(session)
        return self._known[key]

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()


def answer_of(client: Client, session_id: str, count: int) -> tuple[list[int], list[float]]:
    """As `Reference.answer`, of a session, which keeps the tokens."""
    answer = client.generate(session_id, max_new_tokens=count, ignore_eos=True)
    return answer.token_ids, [token.logprob for token in answer.tokens]


class Inspector:
    """Looks at every session after a restart, and brings what its owner knows up to date.

    Args:
        reference: says how sessions must go on.
        outcome: what is counted.
    """

    def __init__(self, reference: Reference, outcome: Outcome) -> None:
        self._reference = reference
        self._outcome = outcome

    def inspect(self, target: str, owners: Sequence[Owner]) -> None:
        """All sessions of all owners, and those that nobody owns."""
        owned = {name for owner in owners for name in owner.sessions}
        with Client(target) as client:
            there = {session.session_id: session for session in client.list_sessions()}
            for name in there.keys() - owned:
                self._wrong("strangers", f"{name} of {there[name].num_tokens} tokens")
                client.delete_session(name)
            for owner in owners:
                for name, known in list(owner.sessions.items()):
                    self._add_unanswered_decode(owner, name, known)
                    if not self._stays(client, name, known, there.get(name)):
                        del owner.sessions[name]

    def _add_unanswered_decode(self, owner: Owner, name: str, known: Known) -> None:
        asked = owner.unanswered_decodes.pop(name, None)
        if asked is not None:
            tokens, count = asked
            known.possible.append(tokens + self._reference.answer(tokens, count)[0])

    def _stays(self, client: Client, name: str, known: Known, session: Session | None) -> bool:
        """Whether its owner goes on with it."""
        owed = known.acknowledged is not None and not known.delete_asked
        self._outcome.checked += owed
        if session is None:
            if owed:
                self._wrong("lost", f"{name} of {len(known.acknowledged or [])} tokens")
            return False
        if known.deleted:
            self._wrong("resurrected", name)
        if known.delete_asked:
            client.delete_session(name)
            return False
        held = self._contents(name, known, session)
        if held is None or not self._goes_on(client, name, held):
            client.delete_session(name)
            return False
        known.acknowledged, known.possible = (held, []) if known.durability == "local" else (None, [held])
        return True

    def _contents(self, name: str, known: Known, session: Session) -> list[int] | None:
        candidates = [*known.possible, *([] if known.acknowledged is None else [known.acknowledged])]
        for tokens in candidates:
            if token_digest(tokens) == session.token_digest:
                if session.num_tokens == len(tokens):
                    return tokens
                self._wrong("corrupt", f"{name} says {session.num_tokens} tokens, the digest is of {len(tokens)}")
                return None
        lengths = [len(tokens) for tokens in candidates]
        self._wrong("corrupt", f"{name} ({known.durability}) has {session.num_tokens} tokens, may have {lengths}")
        return None

    def _goes_on(self, client: Client, name: str, tokens: list[int]) -> bool:
        try:
            child = client.fork_session(name, durability="none", lease_seconds=60).session_id
            found, logprobs = answer_of(client, child, _ANSWER_TOKENS)
            client.delete_session(child)
        except SalePrefillError as error:
            self._wrong("corrupt", f"{name} of {len(tokens)} tokens cannot go on: {error}")
            return False
        expected, wanted = self._reference.answer(tokens)
        off = max(abs(a - b) for a, b in zip(logprobs, wanted, strict=True))
        if found != expected or off > _LOGPROB_TOLERANCE:
            self._wrong(
                "corrupt", f"{name} of {len(tokens)} tokens: {found}, not {expected}; logprobs off by {off:.2g}"
            )
            return False
        return True

    def _wrong(self, kind: str, note: str) -> None:
        setattr(self._outcome, kind, getattr(self._outcome, kind) + 1)
        self._outcome.notes.append(f"after kill {self._outcome.kills}: {kind}: {note}")


def measure(kills: int = 100, *, threads: int = 3, seed: int = 1, arguments: Sequence[str] = ()) -> Outcome:
    """Kills a server so many times, always over the same directory.

    `arguments` are more settings of it.
    """
    generator = random.Random(seed)
    prefixes = [[generator.randrange(3, TINY_VOCABULARY) for _ in range(600)] for _ in range(4)]
    owners = [Owner(f"owner-{index}", seed + index, prefixes) for index in range(threads)]
    outcome = Outcome()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        model = ("--model", str(save_tiny_llama(folder / "model", **_MODEL)), *_SERVER)
        untouched = ServerProcess(*model, "--kv-memory", "128M")
        stack.callback(untouched.stop)
        reference = Reference(untouched.target)
        stack.callback(reference.close)
        inspector = Inspector(reference, outcome)
        disk = ("--kv-memory", _KV_MEMORY, "--kv-disk", str(folder / "kv"), *arguments)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        for _ in range(kills + 1):
            process = ServerProcess(*model, *disk)
            stack.callback(process.kill)
            outcome.ready_seconds.append(process.ready_seconds)
            inspector.inspect(process.target, owners)
            if outcome.kills == kills:
                break
            working = [pool.submit(owner.work, process.target) for owner in owners]
            time.sleep(generator.uniform(*_LOAD_SECONDS))
            process.kill()
            outcome.kills += 1
            for each in working:
                each.result()
    outcome.acknowledged = sum(owner.acknowledged for owner in owners)
    outcome.weaker = sum(len(owner.weaker) for owner in owners)
    outcome.notes += [f"weaker: {note}" for owner in owners for note in owner.weaker]
    return outcome


def describe(outcome: Outcome) -> str:
    """The counts, in words."""
    return (
        f"{outcome.kills} kills, {outcome.acknowledged} acknowledgements, {outcome.checked} times an acknowledged "
        f"session looked for: {outcome.lost} lost, {outcome.corrupt} corrupt, {outcome.resurrected} resurrected, "
        f"{outcome.strangers} strangers, {outcome.weaker} weaker answers"
    )


def main() -> int:
    """Prints the counts; fails where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    outcome = measure(options.kills, threads=options.threads, seed=options.seed)
    for note in outcome.notes:
        print(note)
    print(describe(outcome))
    return 0 if outcome.faultless else 1


if __name__ == "__main__":
    raise SystemExit(main())
