"""A request in flight: its events, those who follow it, and whether anybody still wants it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from sale_prefill_server.engine.sampling import SampledToken
from sale_prefill_server.errors import PrefillError
from sale_prefill_server.scheduler.messages import Accepted, DecodeDone, PrefillDone, Progress


class StoppedError(Exception):
    """Raised inside a step when nobody wants its job any more."""


class Job:
    """Events of one request, kept so that a retry sees them from the first.

    The scheduler's thread publishes; any number of coroutines follow. When the last follower leaves before the end, the
    job is marked unwanted and the scheduler stops it; a follower who comes back in time takes the mark away.

    Args:
        accepted: first event.
    """

    def __init__(self, accepted: Accepted) -> None:
        self.accepted = accepted
        self.admitted_seconds = time.monotonic()
        self.started_seconds: float | None = None
        self.tokens: list[SampledToken] = []
        self.result: PrefillDone | DecodeDone | None = None
        self.error: PrefillError | None = None
        self._progress = (accepted.cached_tokens, 0.0)
        self._prefilling = True
        self._lock = threading.Lock()
        self._followers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._abandoned = False
        self._cancelled = False

    @property
    def done(self) -> bool:
        """True once there is a result or an error."""
        return self.result is not None or self.error is not None

    @property
    def unwanted(self) -> bool:
        """True when the job should stop."""
        return self._abandoned or self._cancelled

    @property
    def cancelled(self) -> bool:
        """True when the job was told to stop for good, whoever follows it."""
        return self._cancelled

    @property
    def queue_seconds(self) -> float:
        """Time from admission to the first step, so far."""
        return (self.started_seconds or time.monotonic()) - self.admitted_seconds

    def admit(self, accepted: Accepted) -> None:
        """Replaces the first event, before anybody follows."""
        self.accepted = accepted
        self._progress = (accepted.cached_tokens, 0.0)

    def cancel(self) -> None:
        """Marks the job as unwanted, whoever follows it."""
        self._cancelled = True

    def start(self) -> None:
        """Notes the first step."""
        if self.started_seconds is None:
            self.started_seconds = time.monotonic()

    def report_progress(self, computed_tokens: int, completed_ratio: float) -> None:
        """Updates what the next heartbeat says."""
        self._progress = (computed_tokens, completed_ratio)

    def publish_token(self, token: SampledToken) -> None:
        """Adds a sampled token and wakes the followers; heartbeats end, since tokens are the news now."""
        with self._lock:
            self._prefilling = False
            self.tokens.append(token)
        self._wake()

    def finish(self, outcome: PrefillDone | DecodeDone | PrefillError) -> None:
        """Ends the job."""
        with self._lock:
            if isinstance(outcome, PrefillError):
                self.error = outcome
            else:
                self.result = outcome
        self._wake()

    def reopen(self, accepted: Accepted) -> None:
        """Starts a stopped job again, where it stopped."""
        with self._lock:
            self.accepted = accepted
            self.error = None
            self._abandoned = self._cancelled = False
            self.admitted_seconds = time.monotonic()
            self.started_seconds = None

    def _wake(self) -> None:
        with self._lock:
            followers = list(self._followers.items())
        for event, loop in followers:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that follower's loop is closed: nobody is there to wake
                continue

    def _snapshot(self) -> Progress:
        computed_tokens, completed_ratio = self._progress
        return Progress(
            computed_tokens=computed_tokens,
            total_tokens=self.accepted.total_tokens,
            completed_ratio=completed_ratio,
            elapsed_seconds=time.monotonic() - self.admitted_seconds,
            queued=self.started_seconds is None,
        )

    async def follow(
        self, heartbeat_seconds: float
    ) -> AsyncIterator[Progress | SampledToken | PrefillDone | DecodeDone]:
        """Every event after `accepted`, from the first; progress each `heartbeat_seconds` until tokens come.

        Raises:
            PrefillError: the job failed or was stopped.
        """
        wake = asyncio.Event()
        with self._lock:
            self._followers[wake] = asyncio.get_running_loop()
            self._abandoned = False
        sent_tokens = 0
        try:
            while True:
                wake.clear()
                done = self.done  # before the tokens: whatever was published before the end is seen
                while sent_tokens < len(self.tokens):
                    yield self.tokens[sent_tokens]
                    sent_tokens += 1
                if done:
                    break
                try:
                    await asyncio.wait_for(wake.wait(), heartbeat_seconds)
                except TimeoutError:
                    if self._prefilling:
                        yield self._snapshot()
            if self.error is not None:
                raise self.error
            assert self.result is not None
            yield self.result
        finally:
            with self._lock:
                del self._followers[wake]
                if not self._followers and not self.done:
                    self._abandoned = True
