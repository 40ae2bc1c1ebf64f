"""Which tier has acknowledged which version of which record."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sale_prefill_server.store.base import Level, MissingBlocksError, RecordKey, StoreError, UnavailableError


@dataclass
class _Progress:
    """The newest version asked for, the tiers that it was asked of, and what each tier did last."""

    version: int = 0
    asked: frozenset[str] = frozenset()
    done: dict[str, tuple[int, StoreError | None]] = field(default_factory=dict)


class Acknowledgements:
    """Counts versions of records and waits for them. Thread-safe.

    Args:
        levels: level of each durable tier, by name.
    """

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self._levels = dict(levels)
        self._records: dict[RecordKey, _Progress] = {}
        self._changed = threading.Condition()

    def found(self, key: RecordKey, tier: str) -> None:
        """A record was there when the process started."""
        with self._changed:
            self._records.setdefault(key, _Progress()).done[tier] = (0, None)

    def asked(self, key: RecordKey, tiers: Sequence[str]) -> Callable[[str, StoreError | None], None]:
        """A new version is asked of tiers. Returns what to call with a tier's name once it is there or has failed."""
        with self._changed:
            progress = self._records.setdefault(key, _Progress())
            progress.version += 1
            progress.asked = frozenset(tiers)
            version = progress.version

        def done(tier: str, error: StoreError | None) -> None:
            with self._changed:
                if progress.done.get(tier, (-1, None))[0] <= version:
                    progress.done[tier] = version, error
                self._changed.notify_all()

        return done

    def level(self, key: RecordKey) -> Level | None:
        """The highest level at which a tier has the newest version."""
        with self._changed:
            progress = self._records.get(key)
            if progress is None:
                return None
            reached = [
                self._levels[tier]
                for tier, (version, error) in progress.done.items()
                if version == progress.version and error is None
            ]
            return max(reached, default=None)

    def wait(self, key: RecordKey, level: Level, timeout_seconds: float) -> None:
        """Waits until a tier of that level or higher has the version that is the newest now.

        Raises:
            UnavailableError: no tier can, all of them failed, or time is up.
        """
        end = time.monotonic() + timeout_seconds
        with self._changed:
            progress = self._records.get(key)
            if progress is None:
                raise UnavailableError("store", "no such record was put")
            wanted = progress.version
            tiers = [tier for tier, of_tier in self._levels.items() if of_tier >= level]
            tiers = [tier for tier in tiers if tier in progress.asked or wanted == 0]
            if not tiers:
                raise UnavailableError("store", f"no tier that was asked keeps records as durably as {level.name}")
            while True:
                done = [progress.done.get(tier, (-1, None)) for tier in tiers]
                if any(version >= wanted and error is None for version, error in done):
                    return
                if all(version >= wanted for version, _ in done):
                    errors = [error for _, error in done if error is not None]
                    raise _most_useful(errors)
                if not self._changed.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    raise UnavailableError(tiers[0], f"not written in {timeout_seconds:g} s")

    def forget(self, key: RecordKey) -> None:
        """The record is to be removed. Whoever waits for one of its versions still learns of it."""
        with self._changed:
            self._records.pop(key, None)


class Countdown:
    """A future that is done once all of `count` calls are: with the first error, if there was one."""

    def __init__(self, count: int) -> None:
        self.future: Future[None] = Future()
        self._left = count
        self._error: StoreError | None = None
        self._lock = threading.Lock()
        if not count:
            self.future.set_result(None)

    def count(self, error: StoreError | None) -> None:
        """One more is done."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = not self._left
        if last and self._error is not None:
            self.future.set_exception(self._error)
        elif last:
            self.future.set_result(None)


def _most_useful(errors: Sequence[StoreError]) -> StoreError:
    return next((error for error in errors if isinstance(error, MissingBlocksError)), errors[0])
