"""Which task runs next: a pure function over a snapshot of the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskView:
    """What a policy may know of a task.

    `arrival` counts admissions; `last_turn` is the turn in which the task last ran, -1 before its first.
    """

    arrival: int
    prefilling: bool
    last_turn: int
    unwanted: bool


def choose(tasks: Sequence[TaskView]) -> int:
    """Index of the task to run.

    Prefills run one after the other, in order of arrival; decodes share the engine with the running prefill in turns,
    so that neither starves. A task that nobody wants any more goes first: ending it frees memory.

    Raises:
        ValueError: no tasks.
    """
    if not tasks:
        raise ValueError("nothing to choose from")
    for index, task in enumerate(tasks):
        if task.unwanted:
            return index
    prefills = [index for index, task in enumerate(tasks) if task.prefilling]
    candidates = [index for index, task in enumerate(tasks) if not task.prefilling]
    if prefills:
        candidates.append(min(prefills, key=lambda index: tasks[index].arrival))
    return min(candidates, key=lambda index: (tasks[index].last_turn, tasks[index].arrival))
