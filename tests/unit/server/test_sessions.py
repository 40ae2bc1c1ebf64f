"""Leases: granted, renewed, never shortened, ended."""

from __future__ import annotations

import pytest
import torch

from sale_attention import LayerPolicy, SaleConfig
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings, Sequence
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.events import Event, EventBus, SessionChanged
from sale_prefill_server.kv.pool import KvPool, KvShape
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Retention, Session, SessionState

SETTINGS = AttentionSettings(AttentionMode.SALE, 0.004, 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool() -> KvPool:
    return KvPool(KvShape(1, 1, 8, torch.float32, torch.device("cpu")), 2**20)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def manager(clock: Clock, events: list[Event]) -> SessionManager:
    bus = EventBus()
    bus.subscribe(events.append)
    return SessionManager(bus, clock)


def make(manager: SessionManager, pool: KvPool, session_id: str = "a", retention: Retention | None = None) -> Session:
    sequence = Sequence(pool.create(), SETTINGS, SaleConfig(), [LayerPolicy.uniform(1)])
    sequence.kv.reserve(128)
    sequence.kv.extend_to(128)
    session = manager.create("tenant", session_id, sequence, retention or Retention(60.0), {})
    manager.check_in(session, SessionState.READY)
    return session


def reason_of(manager: SessionManager, session_id: str = "a", tenant: str = "tenant") -> Reason:
    with pytest.raises(PrefillError) as caught:
        manager.get(tenant, session_id)
    return caught.value.reason


def test_an_expired_session_is_told_from_an_unknown_one_and_frees_its_memory(
    manager: SessionManager, pool: KvPool, clock: Clock
) -> None:
    make(manager, pool)
    assert pool.used_bytes > 0
    clock.now += 61
    assert reason_of(manager) is Reason.SESSION_EXPIRED
    assert pool.used_bytes == 0
    assert reason_of(manager, "never") is Reason.SESSION_UNKNOWN


def test_a_deleted_session_is_unknown(manager: SessionManager, pool: KvPool) -> None:
    session = make(manager, pool)
    assert manager.delete(session) == pool.shape.page_bytes
    assert reason_of(manager) is Reason.SESSION_UNKNOWN


def test_another_tenant_sees_nothing(manager: SessionManager, pool: KvPool, clock: Clock) -> None:
    make(manager, pool)
    assert reason_of(manager, tenant="other") is Reason.SESSION_UNKNOWN
    assert manager.list("other") == []
    assert manager.renew("other", "a", 60.0) is None
    clock.now += 61
    assert reason_of(manager, tenant="other") is Reason.SESSION_UNKNOWN


def test_renewal_extends_and_never_shortens(manager: SessionManager, pool: KvPool, clock: Clock) -> None:
    session = make(manager, pool)
    manager.renew("tenant", "a", 1.0)
    assert manager.describe(session).remaining_lease_seconds == 60.0
    manager.renew("tenant", "a", 90.0)
    assert manager.describe(session).remaining_lease_seconds == 90.0
    clock.now += 89
    assert manager.get("tenant", "a") is session


def test_a_busy_session_does_not_expire_and_its_lease_goes_on_afterwards(
    manager: SessionManager, pool: KvPool, clock: Clock
) -> None:
    session = make(manager, pool)
    manager.check_out(session)
    clock.now += 1000
    manager.sweep()
    assert manager.get("tenant", "a") is session
    assert manager.describe(session).remaining_lease_seconds is None
    manager.check_in(session, SessionState.READY)
    assert reason_of(manager) is Reason.SESSION_EXPIRED


def test_a_sliding_lease_starts_again_with_each_request(manager: SessionManager, pool: KvPool, clock: Clock) -> None:
    session = make(manager, pool, retention=Retention(60.0, sliding=True))
    clock.now += 50
    manager.check_out(session)
    manager.check_in(session, SessionState.READY)
    assert manager.describe(session).remaining_lease_seconds == 60.0


def test_a_lease_of_zero_ends_with_the_request(manager: SessionManager, pool: KvPool, events: list[Event]) -> None:
    make(manager, pool, retention=Retention(0.0))
    assert pool.used_bytes == 0
    ends = [event for event in events if isinstance(event, SessionChanged) and event.new_state == "gone"]
    assert [event.reason for event in ends] == ["released"]


def test_one_request_at_a_time(manager: SessionManager, pool: KvPool) -> None:
    session = make(manager, pool)
    manager.check_out(session)
    with pytest.raises(PrefillError, match="busy with another request") as caught:
        manager.check_out(session)
    assert caught.value.reason is Reason.SESSION_BUSY
    assert manager.states()[SessionState.BUSY] == 1


def test_a_busy_session_that_is_deleted_goes_at_its_check_in(manager: SessionManager, pool: KvPool) -> None:
    session = make(manager, pool)
    manager.check_out(session)
    manager.delete(session)
    assert pool.used_bytes > 0
    manager.check_in(session, SessionState.READY)
    assert pool.used_bytes == 0


def test_a_reader_keeps_the_memory_until_it_is_done(manager: SessionManager, pool: KvPool) -> None:
    session = make(manager, pool)
    kv = session.sequence.kv.acquire()
    manager.delete(session)
    assert pool.used_bytes > 0
    kv.release()
    assert pool.used_bytes == 0


def test_a_longer_policy_takes_effect_at_once_a_shorter_one_with_the_next_request(
    manager: SessionManager, pool: KvPool
) -> None:
    session = make(manager, pool)
    manager.update(session, Retention(600.0), {"use": "test"})
    assert manager.describe(session).remaining_lease_seconds == 600.0
    manager.update(session, Retention(5.0), None)
    assert manager.describe(session).remaining_lease_seconds == 600.0
    assert session.labels == {"use": "test"}
