"""The one thread that uses the engine: it runs tasks step by step, in the order that the policy says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.events import Event, PrefillChunkDone
from sale_prefill_server.scheduler.policy import TaskView, choose
from sale_prefill_server.scheduler.task import Task
from sale_prefill_server.sessions.session import Session

logger = logging.getLogger(__name__)

#: Weight of the newest chunk in the measured prefill speed: about the last ten chunks count.
_SPEED_WEIGHT = 0.2


@dataclass(frozen=True)
class Load:
    """How busy the engine is. `queued_tokens` counts tokens still to prefill, of waiting and running requests."""

    running_requests: int
    queued_requests: int
    queued_tokens: int
    prefill_tokens_per_second: float

    @property
    def backlog_seconds(self) -> float:
        """Time to work off the queue at the measured speed; 1 before anything was measured."""
        if self.prefill_tokens_per_second == 0.0:
            return 1.0
        return max(0.1, self.queued_tokens / self.prefill_tokens_per_second)


class Scheduler:
    """Owns the engine thread. `add` is thread-safe and quick.

    Args:
        policy: index of the task to run next.
    """

    def __init__(self, policy: Callable[[Sequence[TaskView]], int] = choose) -> None:
        self._policy = policy
        self._condition = threading.Condition()
        self._tasks: list[tuple[int, Task]] = []
        self._last_turns: dict[int, int] = {}
        self._arrivals = 0
        self._turn = 0
        self._stopping = False
        self._tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops every task at its next layer and ends the thread."""
        with self._condition:
            self._stopping = True
            for _, task in self._tasks:
                task.job.cancel()
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """False once the thread has ended, by `stop` or by a fault."""
        return self._thread.is_alive()

    def add(self, task: Task) -> None:
        """Queues a task.

        Raises:
            PrefillError: SHUTTING_DOWN.
        """
        with self._condition:
            if self._stopping:
                raise PrefillError(
                    Reason.SHUTTING_DOWN, "the server is stopping: try another one", retry_after_seconds=1.0
                )
            self._tasks.append((self._arrivals, task))
            self._arrivals += 1
            self._condition.notify()

    def cancel(self, session: Session) -> None:
        """Tells the task that has this session checked out to stop at its next layer."""
        with self._condition:
            for _, task in self._tasks:
                if task.session is session:
                    task.job.cancel()

    def load(self) -> Load:
        """How busy the engine is now."""
        with self._condition:
            tasks = [task for _, task in self._tasks if not task.job.done]
        running = sum(task.job.started_seconds is not None for task in tasks)
        return Load(
            running_requests=running,
            queued_requests=len(tasks) - running,
            queued_tokens=sum(task.remaining_tokens for task in tasks),
            prefill_tokens_per_second=self._tokens_per_second,
        )

    def observe(self, event: Event) -> None:
        """Event subscriber: measures the prefill speed."""
        if isinstance(event, PrefillChunkDone) and event.duration_seconds > 0:
            speed = event.num_tokens / event.duration_seconds
            old = self._tokens_per_second
            self._tokens_per_second = speed if old == 0.0 else old + _SPEED_WEIGHT * (speed - old)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._tasks and not self._stopping:
                    self._condition.wait()
                if not self._tasks:
                    return
                arrival, task = self._next()
            if self._step(task):
                with self._condition:
                    self._tasks.remove((arrival, task))
                    self._last_turns.pop(arrival, None)

    def _next(self) -> tuple[int, Task]:
        views = [
            TaskView(arrival, task.prefilling, self._last_turns.get(arrival, -1), task.job.unwanted)
            for arrival, task in self._tasks
        ]
        chosen = self._tasks[self._policy(views)]
        self._last_turns[chosen[0]] = self._turn
        self._turn += 1
        return chosen

    def _step(self, task: Task) -> bool:
        try:
            return task.run_step()
        except Exception as error:  # a fault in our own bookkeeping must not take the engine thread down
            logger.exception("task of session %s broke", task.session.session_id)
            task.job.finish(PrefillError(Reason.ENGINE_FAILED, f"internal fault ({type(error).__name__}: {error})"))
            return True
