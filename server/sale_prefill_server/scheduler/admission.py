"""Whether a request may enter, and as what: checks, idempotency, the session it works on, room for its KV."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.sampling import Sampler
from sale_prefill_server.engine.sequence import AttentionSettings
from sale_prefill_server.engine.sequence import Sequence as EngineSequence
from sale_prefill_server.errors import PrefillError, Reason, invalid_field, kv_capacity
from sale_prefill_server.events import EventBus, RequestFinished
from sale_prefill_server.kv.pool import PAGE_TOKENS, KvCapacityError, SessionKv
from sale_prefill_server.scheduler.decode_task import DecodeTask
from sale_prefill_server.scheduler.job import Job
from sale_prefill_server.scheduler.loader import Loader
from sale_prefill_server.scheduler.messages import Accepted, DecodeCommand, InterruptPolicy, PrefillCommand
from sale_prefill_server.scheduler.prefill_task import PrefillTask, RestoreTask
from sale_prefill_server.scheduler.requests import RequestRegistry
from sale_prefill_server.scheduler.scheduler import Scheduler
from sale_prefill_server.scheduler.task import Task
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Retention, Session, SessionState


@dataclass(frozen=True)
class Admitted:
    """A job to follow; `joined` says that an earlier call with the same request_id started it.

    Where the command wants it, `kv` is a reference to the session's KV, which the caller releases, and `tokens` what
    the session holds when the job is done.
    """

    job: Job
    joined: bool
    kv: SessionKv | None = None
    tokens: array[int] = field(default_factory=lambda: array("I"))


class Admission:
    """Turns commands into jobs. Called from the event loop; nothing here waits for compute.

    Args:
        engine: the model.
        manager: sessions.
        scheduler: runs what is admitted.
        loader: brings back KV from other tiers, where there are any.
        events: told of refusals, and by tasks of their ends.
        default_retention: of a session that asks for none.
        prefix_reuse: new sessions take KV from others of their tenant, where the request allows it.
        max_queued_requests: requests that may wait or run at once.
        request_retention_seconds: how long a request_id is remembered.
    """

    def __init__(
        self,
        engine: Engine,
        manager: SessionManager,
        scheduler: Scheduler,
        events: EventBus,
        *,
        loader: Loader | None = None,
        default_retention: Retention,
        prefix_reuse: bool = True,
        max_queued_requests: int,
        request_retention_seconds: float,
    ) -> None:
        self._engine = engine
        self._manager = manager
        self._scheduler = scheduler
        self._loader = loader
        self._events = events
        self._default_retention = default_retention
        self._prefix_reuse = prefix_reuse
        self._max_queued_requests = max_queued_requests
        self._requests = RequestRegistry(request_retention_seconds)

    def prefill(self, command: PrefillCommand) -> Admitted:
        """Admits a prefill.

        Raises:
            PrefillError: with the reasons of proto/sale_prefill/v1/error.proto; every session is as it was then.
        """
        return self._admit(command, "prefill")

    def decode(self, command: DecodeCommand) -> Admitted:
        """Admits a decode.

        Raises:
            PrefillError: with the reasons of proto/sale_prefill/v1/error.proto; every session is as it was then.
        """
        return self._admit(command, "decode")

    def open_import(self, tenant: str, token_ids: Sequence[int], attention: AttentionSettings | None) -> EngineSequence:
        """An empty sequence with room for the KV of `token_ids`, which comes from elsewhere; the caller owns it.

        Args:
            tenant: whose it is.
            token_ids: all that the session is to hold.
            attention: of what will be appended; None for the server's default.

        Raises:
            PrefillError: NO_TOKENS, INVALID_TOKEN, CONTEXT_EXCEEDED, KV_CAPACITY.
        """
        if not len(token_ids):
            raise PrefillError(Reason.NO_TOKENS, "token_ids is empty: say which tokens the KV is of", field="token_ids")
        self._check_tokens(token_ids)
        self._check_length(len(token_ids))
        sequence = self._engine.open(attention or self._engine.defaults, tenant)
        try:
            self._take_room(sequence, len(token_ids))
        except PrefillError:
            sequence.release()
            raise
        return sequence

    def _admit(self, command: PrefillCommand | DecodeCommand, kind: str) -> Admitted:
        try:
            earlier = self._requests.find(command) if command.request_id else None
            if earlier is not None and self._join(earlier):
                return self._admitted(earlier, command, joined=True)
            self._check_tokens(command.token_ids)
            self._check_queue()
            task = self._new_prefill(command) if isinstance(command, PrefillCommand) else self._new_decode(command)
        except PrefillError as error:
            self._events.emit(RequestFinished(kind=kind, outcome="rejected", reason=error.reason))
            raise
        self._requests.remember(command, task)
        admitted = self._admitted(task, command, joined=False)
        self._start(task)
        return admitted

    def _admitted(self, task: Task, command: PrefillCommand | DecodeCommand, *, joined: bool) -> Admitted:
        if not (isinstance(command, PrefillCommand) and command.wants_kv):
            return Admitted(task.job, joined)
        session = task.session
        try:
            return Admitted(task.job, joined, session.sequence.kv.acquire(), task.all_tokens)
        except ValueError:
            raise PrefillError(
                Reason.SESSION_UNKNOWN,
                f"session {session.session_id!r} has ended, and its KV with it: prefill again",
                metadata={"session_id": session.session_id},
            ) from None

    def bring_back(self, session: Session) -> Job | None:
        """Has the KV of an idle session brought back to the device; None where it is there.

        Raises:
            PrefillError: SESSION_BUSY, KV_CAPACITY.
        """
        if session.is_resident:
            return None
        self._manager.check_out(session)
        try:
            self._reserve_room(session, session.num_tokens)
        except PrefillError:
            self._undo(session, created=False)
            raise
        task = RestoreTask(
            self._engine,
            self._manager,
            self._events,
            session,
            Job(self._accepted(session, 0)),
            token_ids=(),
            on_interrupt=InterruptPolicy.KEEP,
            created=False,
            num_top_logits=0,
        )
        self._start(task)
        return task.job

    def _start(self, task: Task) -> None:
        if self._loader is not None and task.wants_loading:
            self._loader.submit(task)
        else:
            self._scheduler.add(task)

    def _join(self, task: Task) -> bool:
        """Whether an earlier call's job serves this one: it runs, it has its result, or it goes on where it stopped."""
        job = task.job
        if job.result is not None or not (job.done or job.cancelled):
            return True
        if not task.resumable:
            return False
        self._manager.check_out(task.session)
        try:
            self._reserve_room(task.session, task.room_tokens)
        except PrefillError:
            self._undo(task.session, created=False)
            raise
        task.reopen(self._accepted(task.session, task.remaining_tokens))
        self._start(task)
        return True

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        if not len(token_ids):
            return
        tokens = np.asarray(token_ids, dtype=np.int64)
        size = self._engine.model.vocabulary_size
        wrong = np.flatnonzero((tokens < 0) | (tokens >= size))
        if wrong.size:
            index, token = int(wrong[0]), int(tokens[wrong[0]])
            raise PrefillError(
                Reason.INVALID_TOKEN,
                f"token_ids[{index}] = {token} is outside the vocabulary of {size} tokens: "
                "tokenize with this model's own tokenizer",
                metadata={"index": index, "token_id": token, "vocabulary_size": size},
                field=f"token_ids[{index}]",
            )

    def _check_queue(self) -> None:
        load = self._scheduler.load()
        loading = 0 if self._loader is None else self._loader.loading_requests
        if load.running_requests + load.queued_requests + loading >= self._max_queued_requests:
            raise PrefillError(
                Reason.QUEUE_FULL,
                f"{load.queued_requests + loading} requests wait and {load.running_requests} run, the limit is "
                f"{self._max_queued_requests}: come back in {load.backlog_seconds:.1f} s",
                metadata={"queued_requests": load.queued_requests, "queued_tokens": load.queued_tokens},
                retry_after_seconds=load.backlog_seconds,
            )

    def _check_length(self, total_tokens: int) -> None:
        limit = self._engine.model.max_sequence_tokens
        if total_tokens > limit:
            raise PrefillError(
                Reason.CONTEXT_EXCEEDED,
                f"{total_tokens} tokens are longer than the model's context of {limit} tokens: send fewer",
                metadata={"total_tokens": total_tokens, "max_sequence_tokens": limit},
                field="token_ids",
            )

    def _new_prefill(self, command: PrefillCommand) -> Task:
        if not len(command.token_ids):
            raise PrefillError(Reason.NO_TOKENS, "token_ids is empty: there is nothing to prefill", field="token_ids")
        session = self._manager.find(command.tenant, command.session_id) if command.session_id else None
        if session is None:
            self._require_creatable(command)
            session, created = self._create(command), True
        else:
            self._check_out(session, command)
            created = False
        total_tokens = session.num_tokens + len(command.token_ids)
        task = PrefillTask(
            self._engine,
            self._manager,
            self._events,
            session,
            Job(self._accepted(session, len(command.token_ids))),
            token_ids=command.token_ids,
            on_interrupt=command.on_interrupt,
            created=created,
            reuses_prefix=command.reuse_prefix and self._prefix_reuse,
            num_top_logits=command.num_top_logits,
        )
        try:
            self._check_length(total_tokens)
            self._check_settings(session, command.attention)
            task.adopt_prefix()
            self._reserve_room(session, total_tokens)
        except PrefillError:
            self._undo(session, created)
            raise
        task.job.admit(self._accepted(session, total_tokens - session.num_tokens))
        return task

    def _new_decode(self, command: DecodeCommand) -> Task:
        session = self._manager.get(command.tenant, command.session_id)
        self._check_out(session, command)
        try:
            total_tokens = session.num_tokens + len(command.token_ids)
            room = self._engine.model.max_sequence_tokens - total_tokens
            self._check_length(total_tokens + 1)
            self._reserve_room(session, total_tokens + min(command.max_new_tokens, room))
            accepted = self._accepted(session, len(command.token_ids))
        except PrefillError:
            self._undo(session, created=False)
            raise
        eos = frozenset() if command.ignore_eos else frozenset(self._engine.model.eos_token_ids)
        return DecodeTask(
            self._engine,
            self._manager,
            self._events,
            session,
            Job(accepted),
            token_ids=command.token_ids,
            on_interrupt=command.on_interrupt,
            created=False,
            sampler=Sampler(command.sampling, command.num_top_logprobs),
            max_new_tokens=command.max_new_tokens,
            stop_token_ids=command.stop_token_ids | eos,
        )

    def _require_creatable(self, command: PrefillCommand) -> None:
        """A session that does not exist is created, unless the caller counts on what it held."""
        self._check_length(len(command.token_ids))
        if not command.session_id:
            if command.expected_prefix_tokens:
                raise invalid_field(
                    "session_id", "is empty, but expected_prefix_tokens names a session that holds tokens"
                )
            return
        if command.expected_prefix_tokens == 0:
            return
        try:
            self._manager.get(command.tenant, command.session_id)
        except PrefillError as error:
            if error.reason is Reason.SESSION_EXPIRED or command.expected_prefix_tokens:
                raise

    def _create(self, command: PrefillCommand) -> Session:
        settings = command.attention or self._engine.defaults
        retention = command.retention or self._default_retention
        sequence = self._engine.open(settings, command.tenant)
        return self._manager.create(command.tenant, command.session_id, sequence, retention, command.labels)

    def _check_out(self, session: Session, command: PrefillCommand | DecodeCommand) -> None:
        expected = command.expected_prefix_tokens
        self._manager.check_out(session)
        if expected is not None and expected != session.num_tokens:
            self._undo(session, created=False)
            raise PrefillError(
                Reason.PREFIX_MISMATCH,
                f"session {session.session_id!r} holds {session.num_tokens} tokens, the request expects {expected}: "
                "look at the session and send what is missing",
                metadata={"num_tokens": session.num_tokens, "expected_prefix_tokens": expected},
                field="expected_prefix_tokens",
            )

    def _check_settings(self, session: Session, asked: AttentionSettings | None) -> None:
        held = session.sequence.settings
        if asked is not None and asked != held:
            raise PrefillError(
                Reason.ATTENTION_MISMATCH,
                f"session {session.session_id!r} was created with {held}; the request asks for {asked}: "
                "leave attention out, or start another session",
                field="attention",
            )

    def _reserve_room(self, session: Session, total_tokens: int) -> None:
        """Pages for `total_tokens`; sessions that other tiers have leave the device where that makes room."""
        pages = -(-total_tokens // PAGE_TOKENS)
        num_bytes = pages * self._engine.model.kv_shape.page_bytes
        self._manager.check_pin_quota(session.tenant, session.retention, num_bytes, but=session)
        self._take_room(session.sequence, total_tokens)

    def _take_room(self, sequence: EngineSequence, num_tokens: int) -> None:
        try:
            sequence.kv.reserve(num_tokens)
        except KvCapacityError as error:
            if not self._manager.make_room(error.needed_bytes - error.free_bytes):
                raise kv_capacity(error) from error
            try:
                sequence.kv.reserve(num_tokens)
            except KvCapacityError as again:
                raise kv_capacity(again) from again

    def _accepted(self, session: Session, new_tokens: int) -> Accepted:
        load = self._scheduler.load()
        return Accepted(
            session_id=session.session_id,
            queue_position=load.running_requests + load.queued_requests,
            queued_tokens=load.queued_tokens,
            cached_tokens=session.num_tokens,
            total_tokens=session.num_tokens + new_tokens,
        )

    def _undo(self, session: Session, created: bool) -> None:
        if created:
            self._manager.drop(session, "rejected")
        else:
            self._manager.check_in(session, session.state_before_busy or SessionState.READY)
