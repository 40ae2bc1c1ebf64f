"""Answers wait until a session is as durable as its policy promises."""

from __future__ import annotations

import asyncio

from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.sessions.session import Durability, Session
from sale_prefill_server.store.base import StoreError


async def promise_kept(session: Session) -> None:
    """Waits until what a session is now has been saved as far as its retention says before an answer is sent.

    Raises:
        PrefillError: STORE_UNAVAILABLE; the session is there all the same.
    """
    saved = session.saved
    if saved is None or session.retention.durability not in (Durability.LOCAL, Durability.SHARED):
        return
    try:
        await asyncio.wrap_future(saved.done)
    except StoreError as error:
        raise PrefillError(
            Reason.STORE_UNAVAILABLE,
            f"session {session.session_id!r} is there, but it is not as durable as promised: {error}; ask for the same "
            "durability again with UpdateSession, or go on without",
            metadata={"session_id": session.session_id},
            retry_after_seconds=1.0,
        ) from error
