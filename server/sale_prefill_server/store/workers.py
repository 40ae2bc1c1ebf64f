"""Threads that may get stuck in a tier without holding anybody else up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Workers:
    """A few daemon threads that run what they are given, in order. A call that never returns costs one of them.

    An executor of the standard library would wait for such a call when the process ends.
    """

    def __init__(self, name: str, count: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(count)]
        self.last_progress_seconds = time.monotonic()
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Runs `call` in a thread; a future that is cancelled before is not run."""
        future: Future[Result] = Future()
        self._queue.put((future, call))
        return future

    def close(self, timeout_seconds: float) -> None:
        """Ends the threads, after what they were given before. Leaves behind those that are stuck."""
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            self.last_progress_seconds = time.monotonic()
            del future, call, item  # not kept alive while waiting
