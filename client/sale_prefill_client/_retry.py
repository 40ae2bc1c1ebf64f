"""How long a call may take, and when it is tried again. No I/O here: the sync and asyncio clients share it."""

from __future__ import annotations

import time

from .errors import DeadlineExceededError, SalePrefillError, SessionBusyError, UnavailableError
from .options import RetryPolicy


class Deadline:
    """A point in monotonic time, shared by all attempts of a call.

    Args:
        timeout_seconds: from now; None for no limit.
    """

    def __init__(self, timeout_seconds: float | None) -> None:
        if timeout_seconds is not None and timeout_seconds <= 0:
            raise ValueError(f"the timeout is {timeout_seconds} seconds; it must be above 0")
        self.timeout_seconds = timeout_seconds
        self._end = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def remaining_seconds(self) -> float | None:
        """Time left, never negative; None for no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class Attempts:
    """Counts the attempts of one call that is safe to repeat.

    Progress sets the count back to zero: a long prefill survives any number of short outages, and since progress comes
    to an end, so do the attempts.

    Args:
        policy: limits and waits.
        deadline: a wait that would pass it is not begun.
        holds: an attempt has something on the server that the next one needs: once a connection broke, the server may
            still be at the last attempt when the next one comes, and refuse that as busy.
    """

    def __init__(self, policy: RetryPolicy, deadline: Deadline, *, holds: bool = False) -> None:
        self._policy = policy
        self._deadline = deadline
        self._holds = holds
        self._broke = False
        self._failures = 0

    def progressed(self) -> None:
        """Note that the call got further than any attempt before."""
        self._failures = 0

    def wait_seconds(self, error: SalePrefillError) -> float:
        """How long to wait before the next attempt.

        Raises:
            SalePrefillError: `error` itself, where another attempt is unsafe, one too many, or past the deadline.
        """
        self._failures += 1
        broke = isinstance(error, UnavailableError)
        own = self._holds and self._broke and isinstance(error, SessionBusyError)
        if not (broke or own) or self._failures >= self._policy.max_attempts:
            raise error
        self._broke = self._broke or broke
        wait_seconds = max(self._policy.backoff_seconds(self._failures), error.retry_after_seconds or 0.0)
        remaining_seconds = self._deadline.remaining_seconds()
        if remaining_seconds is not None and wait_seconds >= remaining_seconds:
            raise DeadlineExceededError(
                f"the next attempt would be past the timeout of {self._deadline.timeout_seconds} seconds; "
                f"the last one failed: {error}"
            ) from error
        return wait_seconds
