"""Sampling: greedy by default, transformers' processors otherwise, reproducible by seed."""

from __future__ import annotations

import pytest
import torch

from sale_prefill_server.engine.sampling import Sampler, Sampling, best_logits
from sale_prefill_server.errors import PrefillError, Reason

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -5.0])


def draws(sampling: Sampling, count: int = 200, history: tuple[int, ...] = ()) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.sample(LOGITS, history).token_id for _ in range(count)]


def test_greedy_takes_the_best_and_reports_its_logprob() -> None:
    token = Sampler(Sampling(), num_top=2).sample(LOGITS, ())
    assert token.token_id == 1
    assert token.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[1]))
    assert [entry[0] for entry in token.top] == [1, 2]


def test_repetition_penalty_turns_greedy_away_from_what_was_said() -> None:
    assert Sampler(Sampling(repetition_penalty=5.0)).sample(LOGITS, (1,)).token_id == 2


def test_top_k_top_p_and_min_p_leave_out_the_unlikely() -> None:
    assert set(draws(Sampling(temperature=5.0, top_k=2, seed=1))) == {1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=0.5, seed=1))) == {1}
    assert set(draws(Sampling(temperature=1.0, min_p=0.3, seed=1))) == {1, 2}


def test_the_seed_decides() -> None:
    assert draws(Sampling(temperature=2.0, seed=2**64 - 1)) == draws(Sampling(temperature=2.0, seed=2**64 - 1))
    assert draws(Sampling(temperature=2.0, seed=3)) != draws(Sampling(temperature=2.0, seed=4))


def test_a_fresh_seed_is_reported_and_reproduces() -> None:
    sampler = Sampler(Sampling(temperature=2.0))
    first = [sampler.sample(LOGITS, ()).token_id for _ in range(50)]
    assert draws(Sampling(temperature=2.0, seed=sampler.seed), 50) == first


def test_sampling_follows_the_distribution() -> None:
    tokens = torch.tensor(draws(Sampling(temperature=1.0, seed=9), count=4000))
    shares = torch.bincount(tokens, minlength=5) / 4000
    torch.testing.assert_close(shares, LOGITS.softmax(-1), atol=0.03, rtol=0)


def test_values_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(PrefillError, match=r"sampling\.top_p = 2\.0") as caught:
        Sampling(top_p=2.0)
    assert caught.value.reason is Reason.INVALID_SAMPLING


def test_best_logits_asks_for_no_more_than_there_are() -> None:
    assert len(best_logits(LOGITS, 99)) == 5
    assert best_logits(LOGITS, 0) == ()
