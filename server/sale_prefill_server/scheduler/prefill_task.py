"""Prefill: append tokens, then the logits of the last position."""

from __future__ import annotations

from typing import Any

from sale_prefill_server.engine.sampling import best_logits
from sale_prefill_server.scheduler.messages import PrefillDone
from sale_prefill_server.scheduler.task import Task


class PrefillTask(Task):
    """Computes the KV of a command's tokens."""

    kind = "prefill"

    def __init__(self, *arguments: Any, num_top_logits: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._num_top_logits = num_top_logits

    @property
    def prefilling(self) -> bool:
        """Always: there is nothing else to do."""
        return True

    def _step(self) -> bool:
        self._append.step(self.job)
        return self._append.remaining_tokens == 0

    def _outcome(self) -> PrefillDone:
        logits = self.session.last_logits
        assert logits is not None
        return PrefillDone(
            self._manager.describe(self.session),
            best_logits(logits, self._num_top_logits),
            self._append.report(self.job.queue_seconds),
        )
