"""What the scheduler runs: a request as a series of short steps on the engine."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from sale_attention import Audit
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.guard import GuardReport
from sale_prefill_server.engine.report import PrefillReport, make_report
from sale_prefill_server.errors import PrefillError, Reason, kv_capacity
from sale_prefill_server.events import EventBus, PrefillChunkDone, PrefillWork, RequestFinished
from sale_prefill_server.kv.pool import KvCapacityError
from sale_prefill_server.scheduler.job import Job, StoppedError
from sale_prefill_server.scheduler.messages import Accepted, DecodeDone, InterruptPolicy, PrefillDone
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Session, SessionInfo, SessionState

logger = logging.getLogger(__name__)


class Append:
    """Prefill of `token_ids` at the end of a session, chunk by chunk.

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
        self._token_ids = token_ids
        self._statistics = engine.new_statistics()
        self._audit: Audit | None = None
        self._guard_report: GuardReport | None = None
        self._compute_seconds = 0.0
        self._reuses_prefix = reuses_prefix and session.num_tokens == 0
        self.prefix_tokens = 0
        self.start = session.num_tokens
        self.end = self.start + len(token_ids)

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to compute."""
        return max(0, self.end - self._session.num_tokens)  # a decode grows the session past the appended tokens

    def adopt_prefix(self, *, copies: bool) -> None:
        """Takes what other sessions hold of the tokens still to compute; see `Sequence.adopt`.

        Raises:
            KvCapacityError: what they hold must be copied, and there is no room.
        """
        if self._reuses_prefix:
            before = self._session.num_tokens
            gained = self._session.sequence.adopt(self._token_ids, copies=copies)
            self.prefix_tokens += gained
            self._session.extend(self._token_ids[before : before + gained], None)

    def step(self, job: Job) -> None:
        """Computes the next chunk.

        Raises:
            StoppedError: nobody wants the job any more; the session holds whole chunks only.
            KvCapacityError: as `adopt_prefix`.
        """
        self.adopt_prefix(copies=True)
        session, position = self._session, self._session.num_tokens
        if position == self.start + self.prefix_tokens:
            self._audit = self._engine.begin_audit(session.sequence, position, self.end)
        boundary = self._engine.next_boundary(position, self.end)
        chunk = self._token_ids[position - self.start : boundary - self.start]
        started = time.perf_counter()

        def on_layer(layer: int) -> None:
            if job.unwanted:
                raise StoppedError
            done = position - self.start + len(chunk) * (layer + 1) / self._engine.model.kv_shape.num_layers
            job.report_progress(position, done / (self.end - self.start))

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
        session.extend(chunk, logits if boundary == self.end else None)
        job.report_progress(boundary, (boundary - self.start) / (self.end - self.start))
        self._events.emit(PrefillChunkDone(len(chunk), duration_seconds))

    def report(self, queue_seconds: float) -> PrefillReport:
        """Costs and sparsity so far."""
        return make_report(
            self._statistics,
            queue_seconds=queue_seconds,
            compute_seconds=self._compute_seconds,
            computed_tokens=min(self._session.num_tokens, self.end) - self.start - self.prefix_tokens,
            cached_tokens=self.start + self.prefix_tokens,
            prefix_tokens=self.prefix_tokens,
            backend=self._engine.attention_backend,
            profile=self._engine.profile_report(self._session.sequence),
            guard=self._guard_report,
        )


class Task(ABC):
    """A request that has its session checked out until it ends.

    Args:
        engine: does the work.
        manager: owner of the session.
        events: told how the request ended.
        session: checked out for this task.
        job: where events go.
        on_interrupt: what to do with the session when the job is stopped.
        created: this request made the session.
        reuses_prefix: a session that it made takes KV from others.
    """

    kind: str

    def __init__(
        self,
        engine: Engine,
        manager: SessionManager,
        events: EventBus,
        session: Session,
        job: Job,
        *,
        token_ids: Sequence[int],
        on_interrupt: InterruptPolicy,
        created: bool,
        reuses_prefix: bool = False,
    ) -> None:
        self.session = session
        self.job = job
        self._engine = engine
        self._manager = manager
        self._events = events
        self._on_interrupt = on_interrupt
        self._created = created
        self._append = Append(engine, events, session, token_ids, reuses_prefix=created and reuses_prefix)
        self._stopped_generation: int | None = None

    @property
    @abstractmethod
    def prefilling(self) -> bool:
        """True while the next step is a prefill chunk."""

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to prefill."""
        return self._append.remaining_tokens

    @property
    def resumable(self) -> bool:
        """True when the task was stopped and its session is as it left it."""
        current = self._manager.find(self.session.tenant, self.session.session_id)
        return current is self.session and self.session.generation == self._stopped_generation

    def run_step(self) -> bool:
        """One step; True when the task is over. Whatever goes wrong ends this task only."""
        if self.job.unwanted:
            self._stop()
            return True
        self.job.start()
        try:
            over = self._step()
        except StoppedError:
            self._stop()
            return True
        except PrefillError as error:
            self._fail(error)
            return True
        except KvCapacityError as error:
            self._fail(kv_capacity(error))
            return True
        except Exception as error:
            logger.exception("%s of session %s failed", self.kind, self.session.session_id)
            self._fail(
                PrefillError(
                    Reason.ENGINE_FAILED,
                    f"the engine failed ({type(error).__name__}: {error}); the session is as it was before",
                )
            )
            return True
        if over:
            self._finish()
        return over

    def adopt_prefix(self) -> None:
        """Takes KV that other sessions hold, as far as that is quick."""
        self._append.adopt_prefix(copies=False)

    @property
    def room_tokens(self) -> int:
        """Tokens that the session needs room for until the task is over."""
        return self._append.end

    def reopen(self, accepted: Accepted) -> None:
        """Goes on after a stop; the caller has checked the session out again."""
        self._stopped_generation = None
        self.job.reopen(accepted)

    @abstractmethod
    def _step(self) -> bool:
        """One step of work; True after the last one."""

    @abstractmethod
    def _outcome(self, session: SessionInfo) -> PrefillDone | DecodeDone:
        """The result, with the session as it was checked in."""

    def _finish(self) -> None:
        outcome = self._outcome(self._manager.check_in(self.session, SessionState.READY))
        self._emit("ok", "")
        self.job.finish(outcome)

    def _stop(self) -> None:
        session = self.session
        if self._on_interrupt is InterruptPolicy.FREE:
            self._put_back("cancelled")
        elif session.num_tokens == 0:
            self._manager.drop(session, "cancelled")
        else:
            self._stopped_generation = session.generation
            self._manager.check_in(session, self._state_when_stopped())
        self._emit("cancelled", Reason.CANCELLED)
        self.job.finish(
            PrefillError(
                Reason.CANCELLED,
                f"the request was stopped after {session.num_tokens} tokens of session {session.session_id!r}; "
                "a retry with the same request_id goes on from there",
                metadata={"session_id": session.session_id, "num_tokens": session.num_tokens},
            )
        )

    def _state_when_stopped(self) -> SessionState:
        if self.session.num_tokens == self._append.start:
            return self.session.state_before_busy or SessionState.READY
        return SessionState.PARTIAL if self._append.remaining_tokens > 0 else SessionState.READY

    def _fail(self, error: PrefillError) -> None:
        self._put_back("failed")
        self._emit("error", error.reason)
        self.job.finish(error)

    def _put_back(self, reason: str) -> None:
        if self._created:
            self._manager.drop(self.session, reason)
        else:
            self.session.truncate(self._append.start)
            self._manager.check_in(self.session, self.session.state_before_busy or SessionState.READY)

    def _emit(self, outcome: str, reason: str) -> None:
        queue_seconds = self.job.queue_seconds
        report = self._append.report(queue_seconds)
        work = PrefillWork(
            computed_tokens=report.computed_tokens,
            cached_tokens=report.cached_tokens,
            prefix_tokens=report.prefix_tokens,
            prompt_tokens=self._append.end,
            queue_seconds=queue_seconds,
            compute_seconds=report.compute_seconds,
            phase_seconds={
                "estimation": report.estimation_seconds,
                "attention": report.attention_seconds,
                "other": report.other_seconds,
            },
            computed_blocks=report.computed_blocks,
            causal_blocks=report.causal_blocks,
            layer_densities=tuple(
                layer.computed_blocks / layer.causal_blocks if layer.causal_blocks else 1.0 for layer in report.layers
            ),
            dense_rows=report.dense_rows,
        )
        self._events.emit(
            RequestFinished(
                kind=self.kind,
                outcome=outcome,
                reason=str(reason),
                prefill=work if self._append.end > self._append.start else None,
                queue_seconds=queue_seconds,
                decoded_tokens=len(self.job.tokens),
                decode_seconds=self._decode_seconds(),
                wasted_tokens=report.computed_tokens if outcome != "ok" and self._stopped_generation is None else 0,
            )
        )

    def _decode_seconds(self) -> float:
        return 0.0
