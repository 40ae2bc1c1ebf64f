"""Prefill and decode through gRPC, against transformers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sale_prefill.v1 import prefill_service_pb2 as pb
from sale_prefill.v1 import session_service_pb2
from tests.support import RunningServer, running_server, tokens_of

DENSE = session_service_pb2.AttentionOptions(mode=session_service_pb2.ATTENTION_MODE_DENSE)


@pytest.fixture(scope="module")
def plain_model(tiny_model: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa").eval()


def greedy(model: object, token_ids: list[int], count: int) -> list[int]:
    output = model.generate(  # type: ignore[attr-defined]
        torch.tensor([token_ids]), max_new_tokens=count, do_sample=False, eos_token_id=[], pad_token_id=0
    )
    return output[0, len(token_ids) :].tolist()


def test_events_come_in_order_accepted_progress_result(tiny_server: RunningServer) -> None:
    request = pb.PrefillRequest(token_ids=tokens_of(2000), session_id="order")
    events = [event.WhichOneof("event") for event in tiny_server.prefill.Prefill(request)]
    assert events[0] == "accepted"
    assert events[-1] == "result"
    assert set(events[1:-1]) <= {"progress"}


@pytest.mark.parametrize("count", [1, 100, 1500])
def test_greedy_decode_after_dense_prefill_equals_generate(
    tiny_server: RunningServer, plain_model: object, count: int
) -> None:
    prompt = tokens_of(count, seed=count)
    session = tiny_server.prefill_tokens(prompt, attention=DENSE).session
    decoded = tiny_server.decode_tokens(session.session_id, 24, ignore_eos=True)
    assert decoded == greedy(plain_model, prompt, 24)


def test_top_logits_are_those_of_the_last_position(tiny_server: RunningServer, plain_model: object) -> None:
    prompt = tokens_of(300)
    result = tiny_server.prefill_tokens(prompt, attention=DENSE, num_top_logits=5)
    with torch.no_grad():
        expected = plain_model(torch.tensor([prompt])).logits[0, -1]  # type: ignore[operator]
    values, indices = expected.topk(5)
    assert [entry.token_id for entry in result.top_logits] == indices.tolist()
    assert [entry.logit for entry in result.top_logits] == pytest.approx(values.tolist(), abs=1e-4)
    logprobs = expected.log_softmax(-1)[indices]
    assert [entry.logprob for entry in result.top_logits] == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_appending_gives_what_one_prefill_gives(tiny_server: RunningServer, plain_model: object) -> None:
    prompt = tokens_of(900)
    first = tiny_server.prefill_tokens(prompt[:700], session_id="appended", attention=DENSE)
    second = tiny_server.prefill_tokens(prompt[700:], session_id="appended", expected_prefix_tokens=700)
    assert (first.stats.computed_tokens, first.stats.cached_tokens) == (700, 0)
    assert (second.stats.computed_tokens, second.stats.cached_tokens) == (200, 700)
    assert second.session.generation > first.session.generation
    assert tiny_server.decode_tokens("appended", 16, ignore_eos=True) == greedy(plain_model, prompt, 16)


def test_decode_appends_tokens_first_and_keeps_what_it_sampled(tiny_server: RunningServer, plain_model: object) -> None:
    prompt, question = tokens_of(200), tokens_of(40, seed=7)
    tiny_server.prefill_tokens(prompt, session_id="dialogue", attention=DENSE)
    answer = tiny_server.decode_tokens("dialogue", 8, token_ids=question, ignore_eos=True)
    assert answer == greedy(plain_model, prompt + question, 8)
    assert tiny_server.session("dialogue").num_tokens == 248
    more = tiny_server.decode_tokens("dialogue", 8, ignore_eos=True)
    assert more == greedy(plain_model, prompt + question + answer, 8)


def test_the_report_accounts_for_every_second_token_and_block(tiny_server: RunningServer) -> None:
    stats = tiny_server.prefill_tokens(tokens_of(2500)).stats
    phases = (stats.estimation_duration, stats.attention_duration, stats.other_duration)
    assert sum(phase.ToNanoseconds() for phase in phases) == pytest.approx(
        stats.compute_duration.ToNanoseconds(), rel=0.01
    )
    assert stats.estimation_duration.ToNanoseconds() > 0
    assert stats.computed_tokens == 2500
    # 2500 rows are 40 query blocks of 64, the last of them short; the causal mask allows 2 key blocks of 32 for each.
    allowed_by_head = sum(2 * (block + 1) for block in range(39)) + 79
    assert stats.causal_blocks == allowed_by_head * 4 * 2
    assert sum(layer.computed_blocks for layer in stats.layers) == stats.computed_blocks
    assert stats.density == pytest.approx(stats.computed_blocks / stats.causal_blocks)
    assert {entry.reason: entry.num_rows for entry in stats.dense_fallbacks} == {pb.DENSE_REASON_SHORT: 1024 * 4 * 2}


def test_rows_turn_sparse_where_it_is_expected_to_pay_and_appends_do_not_move_that(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(model=str(tiny_model), dtype="float32", chunk_tokens=512, dense_rows=0) as server:
        engine = server.server._service.engine  # type: ignore[union-attr]
        crossover = engine.geometry(engine.defaults).dense_rows
        whole = server.prefill_tokens(tokens_of(3000), session_id="whole").stats
        first = server.prefill_tokens(tokens_of(3000)[:2000], session_id="parts").stats
        later = replace(engine.config, dense_rows=2**20)
        monkeypatch.setattr(engine, "geometry", lambda settings: later)  # what a new session would get
        rest = server.prefill_tokens(tokens_of(3000)[2000:], session_id="parts").stats
    assert 1024 <= crossover < 3000
    assert whole.dense_fallbacks[0].num_rows == crossover * 4 * 2
    assert sum(entry.num_rows for stats in (first, rest) for entry in stats.dense_fallbacks) == crossover * 4 * 2


def test_a_threshold_of_one_keeps_fewer_blocks_than_a_small_one(tiny_server: RunningServer) -> None:
    def density(threshold: float) -> float:
        options = session_service_pb2.AttentionOptions(
            mode=session_service_pb2.ATTENTION_MODE_SALE, threshold=threshold
        )
        return tiny_server.prefill_tokens(tokens_of(3000), attention=options).stats.density

    assert density(1.0) < density(1e-6)


def test_stop_token_ends_the_answer_and_is_part_of_it(tiny_server: RunningServer) -> None:
    prompt = tokens_of(100)
    tiny_server.prefill_tokens(prompt, session_id="stop-reference")
    answer = tiny_server.decode_tokens("stop-reference", 10, ignore_eos=True)
    stop = answer[3]
    tiny_server.prefill_tokens(prompt, session_id="stop")
    request = pb.DecodeRequest(session_id="stop", max_new_tokens=10, stop_token_ids=[stop], ignore_eos=True)
    *_, last = tiny_server.prefill.Decode(request)
    assert last.result.finish_reason == pb.FINISH_REASON_STOP
    assert last.result.stats.decoded_tokens == answer.index(stop) + 1
    assert last.result.session.num_tokens == 100 + answer.index(stop) + 1


def test_decode_ends_where_the_context_ends(tiny_server: RunningServer) -> None:
    tiny_server.prefill_tokens(tokens_of(4090), session_id="full", attention=DENSE)
    request = pb.DecodeRequest(session_id="full", max_new_tokens=100, ignore_eos=True)
    *_, last = tiny_server.prefill.Decode(request)
    assert last.result.finish_reason == pb.FINISH_REASON_CONTEXT
    assert last.result.session.num_tokens == 4096


def test_same_seed_same_tokens_and_logprobs_come_with_each(tiny_server: RunningServer) -> None:
    def sample(seed: int) -> list[tuple[int, float]]:
        session = tiny_server.prefill_tokens(tokens_of(50)).session
        request = pb.DecodeRequest(
            session_id=session.session_id,
            max_new_tokens=12,
            ignore_eos=True,
            num_top_logprobs=3,
            sampling=pb.SamplingOptions(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=seed),
        )
        tokens = [token for event in tiny_server.prefill.Decode(request) for token in event.tokens.tokens]
        for token in tokens:
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.logprob
        return [(token.token_id, token.logprob) for token in tokens]

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_a_lease_of_zero_frees_the_session_with_its_request(tiny_server: RunningServer) -> None:
    used_before = tiny_server.server._service.engine.pool.used_bytes  # type: ignore[union-attr]
    policy = session_service_pb2.RetentionPolicy()
    policy.lease_duration.FromSeconds(0)
    result = tiny_server.prefill_tokens(tokens_of(200), retention=policy)
    assert result.session.num_tokens == 200
    assert tiny_server.server._service.engine.pool.used_bytes == used_before  # type: ignore[union-attr]


def test_two_sessions_advance_together(tiny_server: RunningServer) -> None:
    tiny_server.prefill_tokens(tokens_of(100), session_id="slow-reader")
    request = pb.DecodeRequest(session_id="slow-reader", max_new_tokens=64, ignore_eos=True)
    unread = tiny_server.prefill.Decode(request)
    next(iter(unread))
    other = tiny_server.prefill_tokens(tokens_of(300, seed=3))
    assert other.session.num_tokens == 300
    assert sum(len(event.tokens.tokens) for event in unread) == 64
