"""Brings back KV of tasks from other tiers before, and while, they run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sale_prefill_server.errors import PrefillError, kv_capacity
from sale_prefill_server.kv.gate import LoadFailedError
from sale_prefill_server.kv.pool import KvCapacityError
from sale_prefill_server.scheduler.scheduler import Scheduler
from sale_prefill_server.scheduler.task import Task
from sale_prefill_server.sessions.archive import SessionArchive
from sale_prefill_server.sessions.session import Session

#: Tasks that load at the same time; each waits for disks and networks, not for this processor.
_THREADS = 4


class Loader:
    """Tasks on their way to the scheduler. `submit` is thread-safe and quick.

    Args:
        archive: where KV is kept.
        scheduler: gets each task once its first layer is there, or there is nothing to bring back.
    """

    def __init__(self, archive: SessionArchive, scheduler: Scheduler) -> None:
        self._archive = archive
        self._scheduler = scheduler
        self._executor = ThreadPoolExecutor(_THREADS, "kv-load")
        self._lock = threading.Lock()
        self._tasks: list[Task] = []

    @property
    def loading_requests(self) -> int:
        """Tasks that the scheduler does not know yet."""
        with self._lock:
            return len(self._tasks)

    def submit(self, task: Task) -> None:
        """Loads for a task, then schedules it."""
        task.reload = self.submit
        with self._lock:
            self._tasks.append(task)
        self._executor.submit(self._run, task)

    def cancel(self, session: Session) -> None:
        """Tells the task of a session to stop when its first layer is there."""
        with self._lock:
            for task in self._tasks:
                if task.session is session:
                    task.job.cancel()

    def close(self) -> None:
        """Waits for loads that run."""
        self._executor.shutdown(wait=True)

    def _run(self, task: Task) -> None:
        started = False

        def start() -> None:
            nonlocal started
            if not started:
                started = True
                self._leave(task)
                self._scheduler.add(task)

        try:
            while task.wants_loading and not started and not task.job.unwanted:
                self._load(task, start)
            start()
        except PrefillError as error:
            task.refuse(error)
        except KvCapacityError as error:
            self._leave(task)
            task.refuse(kv_capacity(error))

    def _load(self, task: Task, start: Callable[[], None]) -> None:
        running = False

        def run() -> None:
            nonlocal running
            running = True
            start()

        try:
            task.load(self._archive, run)
        except LoadFailedError:
            if not running:  # else the step that waits for a layer hears of it
                task.forget_loaded()
            return
        run()

    def _leave(self, task: Task) -> None:
        with self._lock:
            self._tasks.remove(task)
