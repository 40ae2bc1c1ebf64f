"""Sessions by tenant and id: creation, check-out for one request at a time, leases, expiry."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping

from sale_prefill_server.engine.sequence import Sequence as EngineSequence
from sale_prefill_server.errors import PrefillError, Reason, invalid_field, kv_capacity
from sale_prefill_server.events import EventBus, LeaseRenewed, SessionChanged
from sale_prefill_server.kv.pool import PAGE_TOKENS, KvCapacityError
from sale_prefill_server.sessions.archive import SessionArchive
from sale_prefill_server.sessions.session import (
    Durability,
    KvTier,
    Retention,
    Session,
    SessionInfo,
    SessionPin,
    SessionState,
)

#: Ids of ended sessions that are remembered, to tell an expired session from an unknown one.
REMEMBERED_ENDS = 65536

Key = tuple[str, str]


class SessionManager:
    """Owns every session. Thread-safe; nothing here waits for compute.

    Args:
        events: told of every change of state.
        clock: monotonic seconds.
        archive: other tiers, where sessions are saved after each request.
        pin_quota_bytes: most that one tenant's hard-pinned sessions may take.
    """

    def __init__(
        self,
        events: EventBus,
        clock: Callable[[], float] = time.monotonic,
        archive: SessionArchive | None = None,
        pin_quota_bytes: int | None = None,
    ) -> None:
        self._archive = archive
        self._pin_quota_bytes = pin_quota_bytes
        self._events = events
        self._clock = clock
        self._lock = threading.RLock()
        self._sessions: dict[Key, Session] = {}
        self._expired: OrderedDict[Key, None] = OrderedDict()

    def get(self, tenant: str, session_id: str) -> Session:
        """The session of that id.

        Raises:
            PrefillError: SESSION_EXPIRED or SESSION_UNKNOWN.
        """
        with self._lock:
            self._expire((tenant, session_id))
            session = self._sessions.get((tenant, session_id))
            if session is not None:
                return session
            if (tenant, session_id) in self._expired:
                raise PrefillError(
                    Reason.SESSION_EXPIRED,
                    f"session {session_id!r} expired and its KV was freed: prefill again, and renew the lease in time",
                    metadata={"session_id": session_id},
                )
            raise PrefillError(
                Reason.SESSION_UNKNOWN,
                f"session {session_id!r} is not held here: it was never created, or it was deleted",
                metadata={"session_id": session_id},
            )

    def find(self, tenant: str, session_id: str) -> Session | None:
        """The session of that id, or None."""
        with self._lock:
            self._expire((tenant, session_id))
            return self._sessions.get((tenant, session_id))

    def list(self, tenant: str) -> list[Session]:
        """The tenant's sessions, oldest first."""
        with self._lock:
            self.sweep()
            return [session for (owner, _), session in self._sessions.items() if owner == tenant]

    def states(self) -> Mapping[SessionState, int]:
        """How many sessions there are in each state."""
        with self._lock:
            counts = dict.fromkeys(SessionState, 0)
            for session in self._sessions.values():
                counts[session.visible_state] += 1
            return counts

    def create(
        self, tenant: str, session_id: str, sequence: EngineSequence, retention: Retention, labels: Mapping[str, str]
    ) -> Session:
        """A new session, checked out; an empty id gets a fresh one. The manager owns `sequence` from now on."""
        with self._lock:
            session_id = session_id or uuid.uuid4().hex
            if (tenant, session_id) in self._sessions:
                raise ValueError(f"session {session_id!r} exists; check it out instead")
            session = Session(tenant, session_id, sequence, retention, dict(labels))
            self._sessions[tenant, session_id] = session
            self._expired.pop((tenant, session_id), None)
        self._changed("none", session.state, "created")
        return session

    def check_out(self, session: Session) -> None:
        """Gives the caller the right to change the session's contents, until `check_in`.

        Raises:
            PrefillError: SESSION_BUSY.
        """
        with self._lock:
            if session.state is SessionState.BUSY:
                raise PrefillError(
                    Reason.SESSION_BUSY,
                    f"session {session.session_id!r} is busy with another request: wait for it, or delete with force",
                    metadata={"session_id": session.session_id},
                )
            session.state_before_busy = session.state
            session.state = SessionState.BUSY
        self._changed(session.state_before_busy, SessionState.BUSY, "request")

    def check_in(self, session: Session, state: SessionState) -> SessionInfo:
        """Ends a check-out: the lease starts or goes on, and a session that nobody may keep is freed.

        Returns:
            The session as it was left, before another request can take it.
        """
        with self._lock:
            session.state = state
            session.used_seconds = now = self._clock()
            session.sequence.kv.trim()
            lease_end = now + session.retention.lease_seconds
            if session.deadline_seconds is None:
                session.deadline_seconds = lease_end
            elif session.retention.sliding:
                session.deadline_seconds = max(session.deadline_seconds, lease_end)
            doomed = session.delete_when_idle
            if not doomed and self._archive is not None and session.is_resident and self._archive.wants(session):
                session.saved = self._archive.save(session)
            info = self.describe(session)
        self._changed(SessionState.BUSY, state, "done")
        if doomed:
            self._end(session, "deleted")
        else:
            self._expire((session.tenant, session.session_id))
        return info

    def renew(self, tenant: str, session_id: str, lease_seconds: float | None) -> Session | None:
        """Extends a lease to `lease_seconds` (its own by default) from now; never shortens. None where absent."""
        session = self.find(tenant, session_id)
        self._events.emit(LeaseRenewed(found=session is not None))
        if session is not None:
            with self._lock:
                wanted = session.retention.lease_seconds if lease_seconds is None else lease_seconds
                session.deadline_seconds = max(session.deadline_seconds or 0.0, self._clock() + wanted)
        return session

    def fork(self, parent: Session, session_id: str, num_tokens: int, retention: Retention | None) -> Session | None:
        """A new session of the parent's first `num_tokens` tokens (0: all), idle, its lease begun. Pages are shared.

        None where the parent's KV is not on the device: bring it back, and try again.

        Raises:
            PrefillError: the parent is busy or shorter, the id is taken, or there is no page for the copy.
        """
        with self._lock:
            if session_id and self.find(parent.tenant, session_id) is not None:
                raise _taken(session_id)
            if num_tokens > parent.num_tokens:
                raise invalid_field("num_tokens", f"{num_tokens} of a session that holds {parent.num_tokens} tokens")
            self.check_out(parent)
        try:
            if not parent.is_resident:  # others may have needed its room since it was brought back
                return None
            child = self._forked(parent, session_id, num_tokens or parent.num_tokens, retention)
        finally:
            self.check_in(parent, parent.state_before_busy or SessionState.READY)
        self.check_in(child, SessionState.READY)
        return child

    def _forked(self, parent: Session, session_id: str, num_tokens: int, retention: Retention | None) -> Session:
        sequence = self._forked_sequence(parent, num_tokens)
        try:
            child = self.create(parent.tenant, session_id, sequence, retention or parent.retention, parent.labels)
        except ValueError:
            sequence.release()
            raise _taken(session_id) from None
        child.extend(parent.tokens[:num_tokens], parent.last_logits if num_tokens == parent.num_tokens else None)
        return child

    def _forked_sequence(self, parent: Session, num_tokens: int) -> EngineSequence:
        try:
            return parent.sequence.fork(num_tokens)
        except KvCapacityError as error:
            if not self.make_room(error.needed_bytes - error.free_bytes):
                raise kv_capacity(error) from error
        try:
            return parent.sequence.fork(num_tokens)
        except KvCapacityError as error:
            raise kv_capacity(error) from error

    def update(self, session: Session, retention: Retention | None, labels: Mapping[str, str] | None) -> None:
        """Changes the policy, the labels or both; a shorter lease_seconds takes effect with the next request.

        Raises:
            PrefillError: PIN_QUOTA.
        """
        with self._lock:
            if retention is not None:
                pages = -(-session.num_tokens // PAGE_TOKENS)
                num_bytes = pages * session.sequence.kv.shape.page_bytes
                self.check_pin_quota(session.tenant, retention, num_bytes, but=session)
                session.retention = retention
                if session.deadline_seconds is not None:
                    session.deadline_seconds = max(session.deadline_seconds, self._clock() + retention.lease_seconds)
            if labels is not None:
                session.labels = dict(labels)
            self._save_changed(session)

    def _save_changed(self, session: Session) -> None:
        """A busy session is saved with its next check-in anyway."""
        if self._archive is None or session.state is SessionState.BUSY:
            return
        if session.saved is not None and session.saved.generation == session.generation:
            session.saved = self._archive.resave(session)
        elif session.is_resident and self._archive.wants(session):
            session.saved = self._archive.save(session)

    def delete(self, session: Session) -> int:
        """Frees an idle session now, a busy one at its check-in. Returns the bytes that this frees."""
        with self._lock:
            freed_bytes = session.sequence.kv.exclusive_bytes
            if session.state is SessionState.BUSY:
                session.delete_when_idle = True
                return freed_bytes
        self._end(session, "deleted")
        return freed_bytes

    def check_pin_quota(self, tenant: str, retention: Retention, num_bytes: int, but: Session | None = None) -> None:
        """Hard pins of a tenant stay within its quota.

        Raises:
            PrefillError: PIN_QUOTA.
        """
        if retention.pin is not SessionPin.HARD or self._pin_quota_bytes is None:
            return
        with self._lock:
            pinned_bytes = sum(
                session.pinned_bytes
                for session in self._sessions.values()
                if session.tenant == tenant and session is not but
            )
        needed_bytes = pinned_bytes + num_bytes
        if needed_bytes > self._pin_quota_bytes:
            raise PrefillError(
                Reason.PIN_QUOTA,
                f"hard pins would take {needed_bytes} bytes, the tenant's quota is {self._pin_quota_bytes}: delete "
                "pinned sessions, or pin this one softly",
                metadata={"needed_bytes": needed_bytes, "quota_bytes": self._pin_quota_bytes},
            )

    def drop(self, session: Session, reason: str) -> None:
        """Frees a session whatever its state; for the request that has it checked out."""
        self._end(session, reason)

    def describe(self, session: Session) -> SessionInfo:
        """The session as it is now."""
        archive = self._archive
        with self._lock:
            remaining_seconds = None
            if session.state is not SessionState.BUSY and session.deadline_seconds is not None:
                remaining_seconds = max(0.0, session.deadline_seconds - self._clock())
            return SessionInfo(
                session_id=session.session_id,
                state=session.visible_state,
                num_tokens=session.num_tokens,
                size_bytes=session.sequence.kv.size_bytes,
                created_unix_seconds=session.created_unix_seconds,
                remaining_lease_seconds=remaining_seconds,
                expire_unix_seconds=None if remaining_seconds is None else time.time() + remaining_seconds,
                generation=session.generation,
                token_digest=session.token_digest(),
                retention=session.retention,
                settings=session.sequence.settings,
                labels=dict(session.labels),
                tier=KvTier.DEVICE if session.is_resident or archive is None else archive.tier(session),
                durability=Durability.NONE if archive is None else archive.durability(session),
            )

    def adopt(self, session: Session) -> None:
        """Takes in a session that was found in the archive; its lease starts anew. One of that id here stays."""
        with self._lock:
            if (session.tenant, session.session_id) in self._sessions:
                session.sequence.release()
                return
            self._sessions[session.tenant, session.session_id] = session
            session.deadline_seconds = self._clock() + session.retention.lease_seconds
        self._changed("none", session.visible_state, "recovered")

    def make_room(self, needed_bytes: int) -> bool:
        """Gives up KV on the device of idle sessions that are kept elsewhere, least recently used first.

        Sessions pinned softly go last, those pinned hard never. Whether as much was freed.
        """
        if self._archive is None:
            return False
        with self._lock:
            idle = [
                session
                for session in self._sessions.values()
                if session.visible_state in (SessionState.READY, SessionState.PARTIAL)
                and session.retention.pin is not SessionPin.HARD
                and self._archive.is_saved(session)
            ]
            idle.sort(key=lambda session: (session.retention.pin is SessionPin.SOFT, session.used_seconds))
            for session in idle:
                if needed_bytes <= 0:
                    break
                needed_bytes -= session.sequence.kv.exclusive_bytes
                session.offload()
                self._changed(session.state, SessionState.OFFLOADED, "room")
        return needed_bytes <= 0

    def sweep(self) -> None:
        """Ends every session whose lease is over."""
        with self._lock:
            for key in list(self._sessions):
                self._expire(key)

    def close(self) -> None:
        """Ends every session, at shutdown."""
        with self._lock:
            for session in list(self._sessions.values()):
                self._end(session, "shutdown")

    def _expire(self, key: Key) -> None:
        with self._lock:
            session = self._sessions.get(key)
            if session is None or session.state is SessionState.BUSY or session.deadline_seconds is None:
                return
            if session.deadline_seconds <= self._clock():
                self._end(session, "released" if session.retention.lease_seconds == 0 else "expired")

    def _end(self, session: Session, reason: str) -> None:
        key = (session.tenant, session.session_id)
        with self._lock:
            if self._sessions.pop(key, None) is None:
                return
            if reason in ("expired", "released"):
                self._expired[key] = None
                while len(self._expired) > REMEMBERED_ENDS:
                    self._expired.popitem(last=False)
            # What was deleted is gone; what ran out may serve the same tenant's next prompt while there is room.
            lapsed = reason in ("expired", "released")
            session.sequence.release(keep=lapsed)
            session.last_logits = None
            if self._archive is not None and session.saved is not None and reason != "shutdown":
                session.forgotten = self._archive.forget(*key, keep_blocks=lapsed)
        self._changed(session.state, "gone", reason, time.monotonic() - session.created_seconds)

    def _changed(self, old_state: str, new_state: str, reason: str, lifetime_seconds: float = 0.0) -> None:
        self._events.emit(SessionChanged(str(old_state), str(new_state), reason, lifetime_seconds))


def _taken(session_id: str) -> PrefillError:
    return invalid_field("new_session_id", f"session {session_id!r} exists: choose another, or leave it out")
