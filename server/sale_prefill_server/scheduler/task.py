"""What the scheduler runs: a request as a series of short steps on the engine."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.errors import PrefillError, Reason, kv_capacity
from sale_prefill_server.events import EventBus, PrefillWork, RequestFinished
from sale_prefill_server.kv.gate import LoadFailedError
from sale_prefill_server.kv.pool import KvCapacityError
from sale_prefill_server.scheduler.append import Append
from sale_prefill_server.scheduler.job import Job, StoppedError
from sale_prefill_server.scheduler.messages import Accepted, DecodeDone, InterruptPolicy, PrefillDone
from sale_prefill_server.sessions.archive import SessionArchive
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Durability, Session, SessionInfo, SessionState
from sale_prefill_server.store.base import StoreError

logger = logging.getLogger(__name__)

#: Loads of one task that may fail before it computes what is missing.
_MOST_LOADS = 3


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
    #: Steps begin when the first layer has been brought back, and wait for later ones as they come to them.
    _overlaps_loading = True

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
        self._loads = 0
        self.reload: Callable[[Task], None] | None = None

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

    @property
    def all_tokens(self) -> array[int]:
        """What the session holds once the appended tokens are in."""
        return self._append.all_tokens

    @property
    def wants_loading(self) -> bool:
        """Whether KV that it could use may be in other tiers."""
        if self._loads >= _MOST_LOADS:
            return False
        return not self.session.is_resident or self._append.reuses_prefix

    def load(self, archive: SessionArchive, start: Callable[[], None]) -> None:
        """Brings back KV from other tiers; called off the scheduler's thread, which must not have the task meanwhile.

        Args:
            archive: where from.
            start: called, once at most, when steps may begin; they will wait for layers that are still to come.

        Raises:
            LoadFailedError: `forget_loaded` unless `start` was called, and try again.
            KvCapacityError: no room.
        """
        session, append = self.session, self._append
        sequence = session.sequence
        own = not session.is_resident
        overlaps = self._overlaps_loading and self._loads == 0
        self._loads += 1
        sequence.kv.reserve(self.room_tokens)
        if own:
            sequence.adopt(session.tokens, copies=True, whole=True)
            if session.last_logits is None:
                # Before the first step: without them it would compute the last token again, densely.
                session.last_logits = archive.load_logits(session)

        def on_first_layer(gained: int) -> None:
            append.restored_tokens = gained
            if overlaps:
                start()

        archive.load(
            sequence,
            session.tenant,
            session.tokens if own else append.all_tokens,
            whole=own,
            on_first_layer=on_first_layer,
        )

    def forget_loaded(self) -> None:
        """What was to be brought back did not come.

        Raises:
            KvCapacityError: the room for it was given up and is gone.
        """
        self._append.restored_tokens = 0
        self.session.sequence.kv.load(None)
        self.session.sequence.truncate(0)
        if self._append.reuses_prefix:
            self.session.truncate(0)
        self.session.sequence.kv.reserve(self.room_tokens)

    def refuse(self, error: PrefillError) -> None:
        """Ends a task that was never run."""
        self._fail(error)

    def run_step(self) -> bool:
        """One step; True when the task is over. Whatever goes wrong ends this task only."""
        if self.job.unwanted:
            self._stop()
            return True
        self.job.start()
        try:
            try:
                over = self._step()
            except LoadFailedError:
                self.forget_loaded()
                assert self.reload is not None
                self.reload(self)
                return True
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
        self._loads = 0
        self.job.reopen(accepted)

    @abstractmethod
    def _step(self) -> bool:
        """One step of work; True after the last one."""

    @abstractmethod
    def _outcome(self, session: SessionInfo) -> PrefillDone | DecodeDone:
        """The result, with the session as it was checked in."""

    def _finish(self) -> None:
        session = self.session
        outcome = self._outcome(self._manager.check_in(session, SessionState.READY))
        saved = session.saved
        if saved is None or session.retention.durability not in (Durability.LOCAL, Durability.SHARED):
            self._emit("ok", "")
            self.job.finish(outcome)
            return
        saved.done.add_done_callback(lambda done: self._finish_saved(outcome, done))

    def _finish_saved(self, outcome: PrefillDone | DecodeDone, done: Future[Durability]) -> None:
        """Sends the result once it is as durable as promised, or says that it is not."""
        error = done.exception()
        if error is None:
            self._emit("ok", "")
            self.job.finish(replace(outcome, session=replace(outcome.session, durability=done.result())))
            return
        if not isinstance(error, StoreError):
            logger.error("saving session %s failed", self.session.session_id, exc_info=error)
        failure = PrefillError(
            Reason.STORE_UNAVAILABLE,
            f"session {outcome.session.session_id!r} is ready, but it is not as durable as promised: {error}; send the "
            "same request_id again, or go on without",
            metadata={"session_id": outcome.session.session_id},
            retry_after_seconds=1.0,
        )
        self._stopped_generation = self.session.generation  # the same request_id tries again
        self._emit("error", failure.reason)
        self.job.finish(failure)

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
            restored_tokens=report.restored_tokens,
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
                prefill=work if self._append.end > self._append.start or report.restored_tokens else None,
                queue_seconds=queue_seconds,
                decoded_tokens=len(self.job.tokens),
                decode_seconds=self._decode_seconds(),
                wasted_tokens=report.computed_tokens if outcome != "ok" and self._stopped_generation is None else 0,
            )
        )

    def _decode_seconds(self) -> float:
        return 0.0
