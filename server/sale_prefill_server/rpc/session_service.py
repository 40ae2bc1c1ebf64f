"""SessionService: get, list, renew, update, fork, delete."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace

import grpc

from sale_prefill.v1 import session_service_pb2 as pb
from sale_prefill.v1 import session_service_pb2_grpc
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.rpc.convert import Converter, identifier, labels_of, required_identifier, seconds_of
from sale_prefill_server.rpc.interceptor import current_caller
from sale_prefill_server.rpc.promises import promise_kept
from sale_prefill_server.rpc.residency import brought_back
from sale_prefill_server.scheduler.admission import Admission
from sale_prefill_server.scheduler.scheduler import Scheduler
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import SessionState
from sale_prefill_server.store.base import StoreError

_DEFAULT_PAGE = 100
_MAXIMUM_PAGE = 1000
#: That a deletion may wait for slow tiers.
_FORGET_SECONDS = 10.0
_RETENTION = {
    "retention.lease_duration": "lease_seconds",
    "retention.sliding": "sliding",
    "retention.durability": "durability",
    "retention.pin": "pin",
}
_UPDATABLE = ("retention", *_RETENTION, "labels")


class SessionServicer(session_service_pb2_grpc.SessionServiceServicer):
    """Serves the session calls."""

    def __init__(
        self,
        manager: SessionManager,
        admission: Admission,
        scheduler: Scheduler,
        converter: Converter,
        max_lease_seconds: float,
    ) -> None:
        self._admission = admission
        self._manager = manager
        self._scheduler = scheduler
        self._converter = converter
        self._max_lease_seconds = max_lease_seconds

    async def GetSession(  # noqa: N802
        self, request: pb.GetSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetSessionResponse:
        """One session."""
        session = self._manager.get(current_caller().tenant, required_identifier("session_id", request.session_id))
        return pb.GetSessionResponse(session=self._converter.session(self._manager.describe(session)))

    async def ListSessions(  # noqa: N802
        self, request: pb.ListSessionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListSessionsResponse:
        """A page of the caller's sessions, oldest first; the page token is the last id of the page before."""
        if request.page_size < 0:
            raise invalid_field("page_size", f"{request.page_size}: must be 0 (for {_DEFAULT_PAGE}) or more")
        size = min(request.page_size or _DEFAULT_PAGE, _MAXIMUM_PAGE)
        sessions = self._manager.list(current_caller().tenant)
        if request.page_token:
            created, _, session_id = request.page_token.partition("/")
            try:
                after = (float.fromhex(created), session_id)
            except ValueError as error:
                raise invalid_field(
                    "page_token", f"{request.page_token!r} is not from a response of ListSessions"
                ) from error
            sessions = [item for item in sessions if (item.created_seconds, item.session_id) > after]
        page = sessions[:size]
        more = len(sessions) > size
        return pb.ListSessionsResponse(
            sessions=[self._converter.session(self._manager.describe(session)) for session in page],
            next_page_token=f"{page[-1].created_seconds.hex()}/{page[-1].session_id}" if more else "",
        )

    async def RenewSession(  # noqa: N802
        self, request: pb.RenewSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.RenewSessionResponse:
        """Extends leases; says which sessions are not here."""
        lease_seconds = None
        if request.HasField("lease_duration"):
            lease_seconds = seconds_of("lease_duration", request.lease_duration, self._max_lease_seconds)
        response = pb.RenewSessionResponse()
        for session_id in request.session_ids:
            session = self._manager.renew(current_caller().tenant, session_id, lease_seconds)
            if session is None:
                response.missing_session_ids.append(session_id)
            else:
                response.renewed.append(self._converter.session(self._manager.describe(session)))
        return response

    async def UpdateSession(  # noqa: N802
        self, request: pb.UpdateSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.UpdateSessionResponse:
        """Changes what the mask names."""
        paths = list(request.update_mask.paths)
        if not paths or any(path not in _UPDATABLE for path in paths):
            raise invalid_field("update_mask", f"{paths}: name one or more of {', '.join(_UPDATABLE)}")
        asked = request.session
        session = self._manager.get(
            current_caller().tenant, required_identifier("session.session_id", asked.session_id)
        )
        wanted = self._converter.retention(asked.retention)
        held = session.retention
        named = {_RETENTION[path]: getattr(wanted, _RETENTION[path]) for path in paths if path in _RETENTION}
        retention = wanted if "retention" in paths else replace(held, **named)
        labels = labels_of(asked.labels) if "labels" in paths else None
        self._manager.update(session, retention if retention != held else None, labels)
        await promise_kept(session)
        return pb.UpdateSessionResponse(session=self._converter.session(self._manager.describe(session)))

    async def ForkSession(  # noqa: N802
        self, request: pb.ForkSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ForkSessionResponse:
        """A child that shares the parent's pages."""
        parent = self._manager.get(current_caller().tenant, required_identifier("session_id", request.session_id))
        retention = self._converter.retention(request.retention) if request.HasField("retention") else None
        new_id = identifier("new_session_id", request.new_session_id)
        child = None
        while child is None:
            await brought_back(self._admission, parent)
            # Off the loop: the last page is copied.
            child = await asyncio.to_thread(self._manager.fork, parent, new_id, request.num_tokens, retention)
        await promise_kept(child)
        return pb.ForkSessionResponse(session=self._converter.session(self._manager.describe(child)))

    async def DeleteSession(  # noqa: N802
        self, request: pb.DeleteSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteSessionResponse:
        """Frees a session; a busy one only with force, at its next layer."""
        session_id = required_identifier("session_id", request.session_id)
        tenant = current_caller().tenant
        if request.allow_missing and self._manager.find(tenant, session_id) is None:
            return pb.DeleteSessionResponse()
        session = self._manager.get(tenant, session_id)
        if session.state is SessionState.BUSY:
            if not request.force:
                raise PrefillError(
                    Reason.SESSION_BUSY,
                    f"session {session_id!r} is busy with another request: wait for it, or delete with force",
                    metadata={"session_id": session_id},
                )
            self._scheduler.cancel(session)
        freed_bytes = self._manager.delete(session)
        if session.forgotten is not None:
            await _forgotten(session_id, session.forgotten)
        return pb.DeleteSessionResponse(freed_bytes=freed_bytes)


async def _forgotten(session_id: str, done: Future[None]) -> None:
    """Waits until no tier has the session any more: what was deleted must not come back after a crash."""
    try:
        await asyncio.wait_for(asyncio.wrap_future(done), _FORGET_SECONDS)
    except (StoreError, TimeoutError) as error:
        raise PrefillError(
            Reason.STORE_UNAVAILABLE,
            f"session {session_id!r} is deleted here, but a tier still has its record ({error}): it goes when that "
            "tier works again, and comes back if this server dies before",
            metadata={"session_id": session_id},
        ) from error
