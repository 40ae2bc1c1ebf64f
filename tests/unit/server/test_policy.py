"""Which task runs next."""

from __future__ import annotations

import pytest

from sale_prefill_server.scheduler.policy import TaskView, choose


def task(arrival: int, *, prefilling: bool = True, last_turn: int = -1, unwanted: bool = False) -> TaskView:
    return TaskView(arrival, prefilling, last_turn, unwanted)


def test_prefills_run_in_order_of_arrival() -> None:
    assert choose([task(4, last_turn=9), task(2), task(7)]) == 1


def test_a_running_prefill_is_finished_before_a_younger_one_starts() -> None:
    assert choose([task(0, last_turn=5), task(1)]) == 0


def test_decodes_and_the_running_prefill_take_turns() -> None:
    prefill, first, second = task(0, last_turn=3), task(1, prefilling=False, last_turn=4), task(2, prefilling=False)
    assert choose([prefill, first, second]) == 2
    second = task(2, prefilling=False, last_turn=5)
    assert choose([prefill, first, second]) == 0
    prefill = task(0, last_turn=6)
    assert choose([prefill, first, second]) == 1


def test_what_nobody_wants_goes_first() -> None:
    assert choose([task(0), task(1, prefilling=False), task(9, unwanted=True)]) == 2


def test_an_empty_queue_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing to choose from"):
        choose([])
