"""Prefill: append tokens, then the logits of the last position."""

from __future__ import annotations

from typing import Any

from sale_prefill_server.engine.sampling import best_logits
from sale_prefill_server.scheduler.messages import PrefillDone
from sale_prefill_server.scheduler.task import Task
from sale_prefill_server.sessions.session import SessionInfo


class PrefillTask(Task):
    """Computes the KV of a command's tokens."""

    kind = "prefill"

    def __init__(self, *arguments: Any, num_top_logits: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._num_top_logits = num_top_logits
        self._top_logits: tuple[tuple[int, float, float], ...] = ()

    @property
    def prefilling(self) -> bool:
        """Always: there is nothing else to do."""
        return True

    def _step(self) -> bool:
        if self._append.remaining_tokens:
            self._append.step(self.job)
        if self.session.last_logits is not None:
            self._top_logits = best_logits(self.session.last_logits, self._num_top_logits)
        return self._append.remaining_tokens == 0

    def _outcome(self, session: SessionInfo) -> PrefillDone:
        return PrefillDone(session, self._top_logits, self._append.report(self.job.queue_seconds))


class RestoreTask(PrefillTask):
    """Brings a session's KV back to the device; computes what no tier has."""

    kind = "restore"
    # It has no step that would wait for later layers, and the session is idle, for anyone to read, once it is over.
    _overlaps_loading = False
