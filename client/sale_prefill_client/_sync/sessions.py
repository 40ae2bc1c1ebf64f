# Generated from _async/sessions.py by tools/generate_sync_client.py. Do not edit.
"""Calls on retained sessions."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from sale_prefill.v1 import session_service_pb2, session_service_pb2_grpc

from .. import _requests
from ..options import Durability, Pin
from ..results import RenewResult, Session
from .connection import Connection

_STUB = session_service_pb2_grpc.SessionServiceStub


class SessionCalls(Connection):
    """SessionService. Where a call names a session that is not there, it raises SessionUnknownError or
    SessionExpiredError."""

    def get_session(self, session_id: str, *, timeout_seconds: float | None = None) -> Session:
        """The state of one session."""
        request = session_service_pb2.GetSessionRequest(session_id=session_id)
        response = self._call(
            _STUB, "GetSession", request, timeout_seconds=timeout_seconds, session_id=session_id, repeatable=True
        )
        return Session.from_proto(response.session)

    def list_sessions(self, *, page_size: int = 0, timeout_seconds: float | None = None) -> Generator[Session, None]:
        """The caller's sessions, oldest first, page by page.

        Args:
            page_size: sessions fetched at once; 0 for the server's choice.
            timeout_seconds: for each page; None for the client's default.
        """
        request = session_service_pb2.ListSessionsRequest(page_size=page_size)
        while True:
            page = self._call(_STUB, "ListSessions", request, timeout_seconds=timeout_seconds, repeatable=True)
            for message in page.sessions:
                yield Session.from_proto(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def renew_sessions(
        self, session_ids: Sequence[str], *, lease_seconds: float | None = None, timeout_seconds: float | None = None
    ) -> RenewResult:
        """Extend leases, many at once; never shortens one.

        Args:
            session_ids: sessions to renew.
            lease_seconds: new lease from now; None for each session's own.
            timeout_seconds: None for the client's default.
        """
        request = _requests.renew_request(session_ids, lease_seconds)
        response = self._call(_STUB, "RenewSession", request, timeout_seconds=timeout_seconds, repeatable=True)
        return RenewResult.from_proto(response)

    def update_session(
        self,
        session_id: str,
        *,
        lease_seconds: float | None = None,
        sliding: bool | None = None,
        durability: Durability | None = None,
        pin: Pin | None = None,
        labels: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> Session:
        """Change the retention policy or the labels; what is None stays as it is, and `labels` replaces all labels."""
        request = _requests.update_request(
            session_id, lease_seconds=lease_seconds, sliding=sliding, durability=durability, pin=pin, labels=labels
        )
        response = self._call(_STUB, "UpdateSession", request, timeout_seconds=timeout_seconds, session_id=session_id)
        return Session.from_proto(response.session)

    def fork_session(
        self,
        session_id: str,
        *,
        new_session_id: str | None = None,
        num_tokens: int = 0,
        lease_seconds: float | None = None,
        sliding: bool = False,
        durability: Durability | None = None,
        pin: Pin | None = None,
        timeout_seconds: float | None = None,
    ) -> Session:
        """Make a child that shares the parent's first tokens.

        Args:
            session_id: parent.
            new_session_id: child's id; None lets the server choose.
            num_tokens: tokens to share; 0 for all.
            lease_seconds: child's lease.
            sliding: requests extend the child's lease.
            durability: what the child is to survive, as in `PrefillOptions`.
            pin: how the child stands when memory runs out, as in `PrefillOptions`. Where neither lease, sliding,
                durability nor pin is given, the child has its parent's policy; else what is left out is the server's
                default.
            timeout_seconds: None for the client's default.

        Raises:
            SessionBusyError: a request is changing the parent.
            InvalidFieldError: the parent is shorter, or the child's id is taken.
        """
        request = _requests.fork_request(
            session_id,
            new_session_id=new_session_id,
            num_tokens=num_tokens,
            lease_seconds=lease_seconds,
            sliding=sliding,
            durability=durability,
            pin=pin,
        )
        response = self._call(_STUB, "ForkSession", request, timeout_seconds=timeout_seconds, session_id=session_id)
        return Session.from_proto(response.session)

    def delete_session(
        self,
        session_id: str,
        *,
        allow_missing: bool = False,
        force: bool = False,
        timeout_seconds: float | None = None,
    ) -> int:
        """Free a session's KV now.

        Args:
            session_id: the session.
            allow_missing: succeed where it is not there; this also lets the call be repeated.
            force: stop a running request too, instead of SessionBusyError.
            timeout_seconds: None for the client's default.

        Returns:
            int: bytes freed.
        """
        request = session_service_pb2.DeleteSessionRequest(
            session_id=session_id, allow_missing=allow_missing, force=force
        )
        response = self._call(
            _STUB,
            "DeleteSession",
            request,
            timeout_seconds=timeout_seconds,
            session_id=session_id,
            repeatable=allow_missing,
        )
        freed_bytes: int = response.freed_bytes
        return freed_bytes
