"""Requests by their id, so that a retry never computes twice."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.scheduler.messages import DecodeCommand, PrefillCommand
from sale_prefill_server.scheduler.task import Task

#: Finished requests remembered at most, however young.
REMEMBERED_REQUESTS = 4096


@dataclass
class _Entry:
    fingerprint: bytes
    task: Task
    touched_seconds: float


def fingerprint(command: PrefillCommand | DecodeCommand) -> bytes:
    """SHA-256 of everything that a request asks for."""
    digest = hashlib.sha256(array("Q", command.token_ids))
    digest.update(repr(replace(command, token_ids=())).encode())
    return digest.digest()


class RequestRegistry:
    """Remembers each request's task while it runs and for `retention_seconds` after it was last asked for.

    Used from the event loop only.
    """

    def __init__(self, retention_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._retention_seconds = retention_seconds
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()

    def find(self, command: PrefillCommand | DecodeCommand) -> Task | None:
        """The task of an earlier call with the same request_id, or None.

        Raises:
            PrefillError: REQUEST_ID_REUSED, where that call asked for something else.
        """
        self._purge()
        entry = self._entries.get(_key(command))
        if entry is None:
            return None
        if entry.fingerprint != fingerprint(command):
            raise PrefillError(
                Reason.REQUEST_ID_REUSED,
                f"request_id {command.request_id!r} came before with a different request: use a fresh id for each",
                metadata={"request_id": command.request_id},
                field="request_id",
            )
        entry.touched_seconds = self._clock()
        self._entries.move_to_end(_key(command))
        return entry.task

    def remember(self, command: PrefillCommand | DecodeCommand, task: Task) -> None:
        """Files a task under its command's request_id; an empty id is not filed."""
        if command.request_id:
            self._entries[_key(command)] = _Entry(fingerprint(command), task, self._clock())
            self._entries.move_to_end(_key(command))

    def _purge(self) -> None:
        oldest_kept = self._clock() - self._retention_seconds
        for key, entry in list(self._entries.items()):
            if entry.touched_seconds > oldest_kept and len(self._entries) <= REMEMBERED_REQUESTS:
                break
            if entry.task.job.done:
                del self._entries[key]


def _key(command: PrefillCommand | DecodeCommand) -> tuple[str, str, str]:
    return (type(command).__name__, command.tenant, command.request_id)
