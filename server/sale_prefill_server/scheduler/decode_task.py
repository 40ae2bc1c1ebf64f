"""Decode: append tokens where some are given, then sample one token a step."""

from __future__ import annotations

import time
from typing import Any

from sale_prefill_server.engine.sampling import Sampler
from sale_prefill_server.events import FirstToken
from sale_prefill_server.scheduler.messages import DecodeDone, FinishReason
from sale_prefill_server.scheduler.task import Task
from sale_prefill_server.sessions.session import SessionInfo


class DecodeTask(Task):
    """Samples up to `max_new_tokens`.

    Every sampled token is fed to the model at once, the last one too, so that the session always holds the KV of all
    its tokens and the logits after them.
    """

    kind = "decode"

    def __init__(
        self, *arguments: Any, sampler: Sampler, max_new_tokens: int, stop_token_ids: frozenset[int], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._sampler = sampler
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = stop_token_ids
        self._spent_seconds = 0.0
        self._finish_reason = FinishReason.LENGTH

    @property
    def prefilling(self) -> bool:
        """True until the appended tokens are in."""
        return self._append.remaining_tokens > 0

    @property
    def room_tokens(self) -> int:
        """The appended tokens and those to be decoded."""
        return min(self._append.end + self._max_new_tokens, self._engine.model.max_sequence_tokens)

    def _step(self) -> bool:
        if self.prefilling:
            self._append.step(self.job)
            return False
        started = time.perf_counter()
        try:
            return self._sample_one()
        finally:
            self._spent_seconds += time.perf_counter() - started

    def _sample_one(self) -> bool:
        session = self.session
        if session.last_logits is None:
            self._recompute_last_logits()
        assert session.last_logits is not None
        token = self._sampler.sample(session.last_logits, session.tokens)
        if not self.job.tokens:
            self._events.emit(FirstToken(time.monotonic() - self.job.admitted_seconds))
        self.job.publish_token(token)
        logits = self._engine.decode_token(session.sequence, token.token_id)
        session.extend([token.token_id], logits)
        if token.token_id in self._stop_token_ids:
            self._finish_reason = FinishReason.STOP
        elif len(self.job.tokens) >= self._max_new_tokens:
            self._finish_reason = FinishReason.LENGTH
        elif session.num_tokens >= self._engine.model.max_sequence_tokens:
            self._finish_reason = FinishReason.CONTEXT
        else:
            return False
        return True

    def _recompute_last_logits(self) -> None:
        session = self.session
        session.sequence.truncate(session.num_tokens - 1)
        session.sequence.kv.reserve(self.room_tokens)
        session.last_logits = self._engine.decode_token(session.sequence, session.tokens[-1])

    def _outcome(self, session: SessionInfo) -> DecodeDone:
        appended = self._append.end > self._append.start
        return DecodeDone(
            session=session,
            finish_reason=self._finish_reason,
            prefill=self._append.report(self.job.queue_seconds) if appended else None,
            queue_seconds=self.job.queue_seconds,
            decode_seconds=self._spent_seconds,
            decoded_tokens=len(self.job.tokens),
            seed=self._sampler.seed,
        )

    def _decode_seconds(self) -> float:
        return self._spent_seconds
