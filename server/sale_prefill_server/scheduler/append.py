"""Prefill of tokens at the end of a session, as steps of one chunk."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from sale_attention import Audit
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.guard import GuardReport
from sale_prefill_server.engine.report import PrefillReport, make_report
from sale_prefill_server.events import EventBus, PrefillChunkDone
from sale_prefill_server.scheduler.job import Job, StoppedError
from sale_prefill_server.sessions.session import Session


class Append:
    """Prefill of `token_ids` behind what a session holds, and before that of tokens whose KV is missing.

    With `reuses_prefix`, a session that holds nothing else takes KV from others wherever they are ahead of it.
    """

    def __init__(
        self,
        engine: Engine,
        events: EventBus,
        session: Session,
        token_ids: Sequence[int],
        *,
        reuses_prefix: bool = False,
    ) -> None:
        self._engine = engine
        self._events = events
        self._session = session
        self._token_ids = array("I", token_ids)
        self._statistics = engine.new_statistics()
        self._audit: Audit | None = None
        self._guard_report: GuardReport | None = None
        self._compute_seconds = 0.0
        self._computed_tokens = 0
        self._first_position: int | None = None
        self.reuses_prefix = reuses_prefix and session.num_tokens == 0
        self.prefix_tokens = 0
        self.restored_tokens = 0
        self.start = session.num_tokens
        self.end = self.start + len(token_ids)

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to compute."""
        # A decode grows the session past the appended tokens.
        return max(0, self.end - self._session.sequence.num_tokens)

    @property
    def all_tokens(self) -> array[int]:
        """What the session holds when this is done."""
        return self._session.tokens[: self.start] + self._token_ids

    def adopt_prefix(self, *, copies: bool) -> None:
        """Takes what other sessions hold of the tokens still to compute; see `Sequence.adopt`.

        Raises:
            KvCapacityError: what they hold must be copied, and there is no room.
        """
        if self.reuses_prefix:
            self.prefix_tokens += self._session.sequence.adopt(self._token_ids, copies=copies)
            self.count_gained()

    def count_gained(self) -> None:
        """The sequence got KV of new tokens from elsewhere: they belong to the session now."""
        held, gained = self._session.num_tokens, self._session.sequence.num_tokens
        if gained > held:
            self._session.extend(self._token_ids[held - self.start : gained - self.start], None)

    def step(self, job: Job) -> None:
        """Computes the next chunk.

        Raises:
            StoppedError: nobody wants the job any more; the sequence holds whole chunks only.
            KvCapacityError: as `adopt_prefix`.
            LoadFailedError: KV that was to be brought back did not come; the sequence is worth nothing.
        """
        self.adopt_prefix(copies=True)
        self.count_gained()
        session = self._session
        position = session.sequence.num_tokens
        if self._first_position in (None, position):
            self._first_position = position
            self._audit = self._engine.begin_audit(session.sequence, position, self.end)
        boundary = self._engine.next_boundary(position, self.end)
        chunk = self.all_tokens[position:boundary]
        started = time.perf_counter()

        def on_layer(layer: int) -> None:
            if job.unwanted:
                raise StoppedError
            done = position - self.start + len(chunk) * (layer + 1) / self._engine.model.kv_shape.num_layers
            job.report_progress(position, max(0.0, done) / max(1, self.end - self.start))

        try:
            logits = self._engine.prefill_chunk(
                session.sequence,
                chunk,
                prompt_end=self.end,
                statistics=self._statistics,
                on_layer=on_layer,
                audit=self._audit,
            )
            if self._audit is not None and boundary == self.end:
                self._guard_report = self._engine.finish_audit(session.sequence, self._audit)
        except BaseException:
            session.sequence.truncate(position)
            self._audit = None  # it has seen layers of a chunk that will come again
            raise
        finally:
            duration_seconds = time.perf_counter() - started
            self._compute_seconds += duration_seconds
        self._computed_tokens += len(chunk)
        session.grow(chunk, boundary, logits if boundary == self.end else None)
        job.report_progress(boundary, max(0, boundary - self.start) / max(1, self.end - self.start))
        self._events.emit(PrefillChunkDone(len(chunk), duration_seconds))

    def report(self, queue_seconds: float) -> PrefillReport:
        """Costs and sparsity so far."""
        held = min(self._session.sequence.num_tokens, self.end)
        return make_report(
            self._statistics,
            queue_seconds=queue_seconds,
            compute_seconds=self._compute_seconds,
            computed_tokens=self._computed_tokens,
            cached_tokens=max(0, held - self._computed_tokens),
            prefix_tokens=self.prefix_tokens,
            restored_tokens=self.restored_tokens,
            backend=self._engine.attention_backend,
            profile=self._engine.profile_report(self._session.sequence),
            guard=self._guard_report,
        )
