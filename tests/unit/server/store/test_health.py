"""A tier that fails is left alone, longer each time, and tried by one call at a time."""

from __future__ import annotations

from sale_prefill_server.store.events import StoreEvent, TierDown, TierUp
from sale_prefill_server.store.health import CircuitBreaker


def test_one_failure_opens_it_and_one_try_is_let_through_after_each_pause() -> None:
    now, events = [100.0], list[StoreEvent]()
    breaker = CircuitBreaker("disk", "read", events.append, first_backoff_seconds=1, clock=lambda: now[0])
    assert breaker.allows()
    breaker.failed("I/O error")
    breaker.failed("I/O error")  # another call that was under way
    assert events == [TierDown("disk", "read", "I/O error", 1)]
    assert not breaker.allows()
    now[0] += 1
    assert [breaker.allows(), breaker.allows()] == [True, False]
    now[0] += 0.9
    breaker.failed("I/O error")
    assert events[-1] == TierDown("disk", "read", "I/O error", 2)
    now[0] += 2
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()
    assert events[-1] == TierUp("disk", "read")


def test_pauses_grow_to_a_minute_and_no_further() -> None:
    now, events = [0.0], list[StoreEvent]()
    breaker = CircuitBreaker("disk", "read", events.append, first_backoff_seconds=1, clock=lambda: now[0])
    for _ in range(10):
        breaker.failed("down")
        now[0] += 100
    assert [event.retry_seconds for event in events if isinstance(event, TierDown)][-2:] == [60, 60]
