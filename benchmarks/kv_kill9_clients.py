"""Clients of a server that may be killed at any moment, and what they know of their sessions afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sale_prefill_client import Client, RetryPolicy, Session
from sale_prefill_client.errors import OverloadedError, SalePrefillError
from sale_prefill_client.options import Durability
from tests.support import TINY_VOCABULARY

_LEASE_SECONDS = 3600.0
_MOST_TOKENS = 1500
_SESSIONS_A_THREAD = 6
_ONCE = RetryPolicy(max_attempts=1)


@dataclass
class Known:
    """A session as the client that owns it knows it.

    `acknowledged` is what must be there, None for nothing; `possible` what may be there beside that. `delete_asked` and
    `deleted`: the client has asked for the end of it, and was answered.
    """

    durability: Durability
    acknowledged: list[int] | None = None
    possible: list[list[int]] = field(default_factory=list)
    delete_asked: bool = False
    deleted: bool = False

    @property
    def tokens(self) -> list[int]:
        """What it holds, as far as its owner knows."""
        return self.possible[-1] if self.possible else self.acknowledged or []

    def answered(self, tokens: list[int], session: Session) -> bool:
        """A request came back; whether its result was acknowledged as durable."""
        if session.durability not in ("local", "shared"):
            self.possible.append(tokens)
            return False
        self.acknowledged, self.possible = tokens, []
        return True


class Owner:
    """One client thread and its sessions, over all lives of the server.

    Args:
        name: that its sessions' ids begin with.
        seed: of its random choices.
        prefixes: token ids that new sessions may begin with, so that sessions have blocks in common.
        outcome: counted in; counts of acknowledgements are its own until the thread is joined.
    """

    def __init__(self, name: str, seed: int, prefixes: Sequence[list[int]]) -> None:
        self._name = name
        self._random = random.Random(seed)
        self._prefixes = prefixes
        self._made = 0
        self.sessions: dict[str, Known] = {}
        #: Decodes that were never answered: session id, its tokens when it began, new tokens asked for.
        self.unanswered_decodes: dict[str, tuple[list[int], int]] = {}
        self.acknowledged = 0
        self.weaker: list[str] = []

    def work(self, target: str) -> None:
        """Asks for one thing after another until the server is gone."""
        with Client(target, retry=_ONCE) as client:
            while True:
                try:
                    self._step(client)
                except OverloadedError:
                    time.sleep(0.01)
                except SalePrefillError:
                    return

    def _step(self, client: Client) -> None:
        alive = [name for name, known in self.sessions.items() if not known.delete_asked and known.tokens]
        steps: list[tuple[Callable[[Client, str], None], int]] = [
            (self._append, 4),
            (self._decode, 3),
            (self._fork, 1),
            (self._delete, 1),
        ]
        if not alive or (len(self.sessions) < _SESSIONS_A_THREAD and self._random.random() < 0.5):
            self._create(client)
            return
        (step,) = self._random.choices([each for each, _ in steps], [weight for _, weight in steps])
        step(client, self._random.choice(alive))

    def _create(self, client: Client) -> None:
        prefix = self._random.choice(self._prefixes)
        tokens = prefix[: self._random.randint(1, len(prefix))] + self._tokens(self._random.randint(1, 300))
        durability: Durability = "local" if self._random.random() < 0.7 else "async"
        name, known = self._new(durability)
        known.possible = [tokens]
        result = client.prefill(tokens, session_id=name, durability=durability, lease_seconds=_LEASE_SECONDS)
        self._answered(known, tokens, result.session)

    def _append(self, client: Client, name: str) -> None:
        known = self.sessions[name]
        tokens = known.tokens + self._tokens(self._random.randint(1, 200))
        if len(tokens) > _MOST_TOKENS:
            self._delete(client, name)
            return
        before = list(known.possible)
        known.possible.append(tokens)
        result = client.prefill(tokens[len(before[-1] if before else known.acknowledged or []) :], session_id=name)
        known.possible = before
        self._answered(known, tokens, result.session)

    def _decode(self, client: Client, name: str) -> None:
        known, count = self.sessions[name], self._random.randint(1, 6)
        held = known.tokens
        self.unanswered_decodes[name] = (held, count)
        answer = client.generate(name, max_new_tokens=count, ignore_eos=True)
        del self.unanswered_decodes[name]
        self._answered(known, held + answer.token_ids, answer.result.session)

    def _fork(self, client: Client, name: str) -> None:
        held = self.sessions[name].tokens
        durability: Durability = "local" if self._random.random() < 0.7 else "async"
        child, known = self._new(durability)
        tokens = held[: self._random.randint(1, len(held))]
        known.possible = [tokens]
        session = client.fork_session(
            name,
            new_session_id=child,
            num_tokens=len(tokens),
            durability=durability,
            lease_seconds=_LEASE_SECONDS,
        )
        self._answered(known, tokens, session)

    def _delete(self, client: Client, name: str) -> None:
        known = self.sessions[name]
        known.delete_asked = True
        client.delete_session(name)
        known.deleted = True

    def _answered(self, known: Known, tokens: list[int], session: Session) -> None:
        durable = known.answered(tokens, session)
        self.acknowledged += durable
        if known.durability == "local" and not durable:
            name, generation = session.session_id, session.generation
            self.weaker.append(
                f"{name}, generation {generation}, is to be local and was answered as {session.durability}"
            )

    def _new(self, durability: Durability) -> tuple[str, Known]:
        self._made += 1
        name = f"{self._name}-{self._made}"
        known = self.sessions[name] = Known(durability)
        return name, known

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(3, TINY_VOCABULARY) for _ in range(count)]
