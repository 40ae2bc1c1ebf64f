"""The guard inside the engine: which rows of which requests it looks at, and what becomes of a session meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sale_attention import Audit, SaleConfig, TileResult
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.guard import Guard, GuardReport, GuardSettings
from sale_prefill_server.engine.model import LoadedModel, load_model
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.events import EventBus
from sale_prefill_server.kv.pool import KvPool
from sale_prefill_server.scheduler.job import Job, StoppedError
from sale_prefill_server.scheduler.messages import Accepted
from sale_prefill_server.scheduler.task import Append
from sale_prefill_server.sessions.session import Retention, Session
from tests.support import tokens_of

DEFAULTS = AttentionSettings(AttentionMode.SALE, 0.5, 1)
CHUNK, HEADS, LAYERS = 512, 4, 2


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model, "tiny", device=torch.device("cpu"), dtype="float32")


def engine_of(model: LoadedModel, *, share: float = 1.0, fall_back: bool = True) -> Engine:
    guard = Guard(GuardSettings(share, fall_back, seed=3), None, lambda report: None)
    pool = KvPool(model.kv_shape, 1 << 28)
    return Engine(model, pool, DEFAULTS, SaleConfig(), chunk_tokens=CHUNK, attention_backend="auto", guard=guard)


def session_of(engine: Engine, settings: AttentionSettings = DEFAULTS) -> Session:
    session = Session("tenant", "session", engine.open(settings), Retention(60.0), {})
    session.sequence.kv.reserve(4096)
    return session


def job_of() -> Job:
    return Job(Accepted("session", 0, 0, 0, 0))


def append(engine: Engine, session: Session, count: int, seed: int = 0) -> GuardReport | None:
    work, job = Append(engine, EventBus(), session, tokens_of(count, seed)), job_of()
    while work.remaining_tokens:
        work.step(job)
    return work.report(0.0).guard


def test_every_head_that_is_not_dense_is_seen_whatever_chunk_holds_its_rows(model: LoadedModel) -> None:
    engine = engine_of(model, fall_back=False)
    for _ in range(5):
        report = append(engine, session_of(engine), 2300)
        assert report is not None
        assert sorted((found.tile.layer, found.tile.head) for found in report.tiles) == [
            (layer, head) for layer in range(LAYERS) for head in range(HEADS)
        ]


def test_an_append_is_judged_by_its_own_rows(model: LoadedModel) -> None:
    engine = engine_of(model)
    session = session_of(engine)
    assert append(engine, session, 1000) is None  # rows before the first sparse one
    for number in range(6):
        start = session.num_tokens
        report = append(engine, session, 77, seed=number)
        assert report is not None
        assert all(max(start, 1024) <= found.tile.position < start + 77 for found in report.tiles)
        assert all(1 <= found.rows <= 64 for found in report.tiles)


def test_looking_changes_no_logit(model: LoadedModel) -> None:
    logits = []
    for share in (0.0, 1.0):
        engine = engine_of(model, share=share)
        session = session_of(engine)
        append(engine, session, 2100)
        logits.append(session.last_logits)
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.equal(logits[0], logits[1])


def test_a_threshold_of_the_callers_is_neither_looked_at_nor_changed(model: LoadedModel) -> None:
    engine = engine_of(model)
    assert engine.guard is not None
    engine.guard.guilty_heads = frozenset({(1, 2)})
    own = session_of(engine, AttentionSettings(AttentionMode.SALE, 0.9, 2))
    assert append(engine, own, 2000) is None
    assert not any(any(policy.dense_heads) for policy in own.sequence.policies)
    assert session_of(engine).sequence.policies[1].dense_heads == (False, False, True, False)


def test_a_head_that_falls_stays_sparse_in_sessions_that_are_open(model: LoadedModel) -> None:
    engine = engine_of(model)
    assert engine.guard is not None
    session = session_of(engine)
    append(engine, session, 1500)
    engine.guard.guilty_heads = frozenset({(0, 1)})
    report = append(engine, session, 500)
    assert report is not None
    assert (0, 1) in {(found.tile.layer, found.tile.head) for found in report.tiles}
    assert not any(session.sequence.policies[0].dense_heads)


def test_a_device_without_memory_for_judging_ends_no_request(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(audit: Audit) -> list[TileResult]:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Audit, "results", results)
    engine = engine_of(model)
    session = session_of(engine)
    assert append(engine, session, 2000) is None
    assert session.num_tokens == 2000


@pytest.mark.parametrize("done_chunks", [0, 3])
def test_a_request_that_was_stopped_is_not_judged_by_layers_that_it_ran_twice(
    model: LoadedModel, done_chunks: int
) -> None:
    engine = engine_of(model)
    session = session_of(engine)
    work, job = Append(engine, EventBus(), session, tokens_of(2500)), job_of()
    for _ in range(done_chunks):
        work.step(job)
    job.cancel()
    with pytest.raises(StoppedError):
        work.step(job)
    resumed = job_of()
    while work.remaining_tokens:
        work.step(resumed)
    report = work.report(0.0).guard
    if done_chunks:
        assert report is None
    else:
        assert report is not None
        assert len(report.tiles) == LAYERS * HEADS
