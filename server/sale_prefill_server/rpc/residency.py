"""Calls that read a session's KV wait until the device has it."""

from __future__ import annotations

from sale_prefill_server.scheduler.admission import Admission
from sale_prefill_server.sessions.session import Session


async def brought_back(admission: Admission, session: Session) -> None:
    """Waits until the device has the KV of an idle session.

    Raises:
        PrefillError: it is busy, or there is no room.
    """
    job = admission.bring_back(session)
    if job is not None:
        async for _ in job.follow(1.0):
            pass
