"""Takes a tier that fails out of use for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sale_prefill_server.store.events import StoreObserver, TierDown, TierUp

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 60.0


class CircuitBreaker:
    """One failure opens it for a back-off period, after which one call may try; each further failure doubles it.

    Tiers do their own quick retries, so a failure that arrives here is worth a pause.
    """

    def __init__(
        self,
        tier: str,
        operation: str,
        observer: StoreObserver,
        *,
        first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tier = tier
        self._operation = operation
        self._observer = observer
        self._first = first_backoff_seconds
        self._clock = clock
        self._backoff = 0.0
        self._retry_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the tier is out of use, a try being due or not."""
        return self._backoff > 0

    @property
    def is_due(self) -> bool:
        """Whether a call would be let through."""
        return not self._backoff or self._clock() >= self._retry_at

    def allows(self) -> bool:
        """Whether a call may be made now. Where that is a try, the next one is a back-off period away."""
        with self._lock:
            if not self._backoff:
                return True
            if self._clock() < self._retry_at:
                return False
            self._retry_at = self._clock() + self._backoff
            return True

    def succeeded(self) -> None:
        """A call worked."""
        if not self._backoff:
            return
        with self._lock:
            self._backoff = 0.0
        self._observer(TierUp(self._tier, self._operation))

    def failed(self, reason: str) -> None:
        """A call failed or took too long. Calls that were under way already do not lengthen the pause."""
        with self._lock:
            now = self._clock()
            if self._backoff and now < self._retry_at - self._backoff / 2:
                return
            self._backoff = min(max(2 * self._backoff, self._first), LONGEST_BACKOFF_SECONDS)
            self._retry_at = now + self._backoff
            backoff = self._backoff
        self._observer(TierDown(self._tier, self._operation, reason, backoff))
