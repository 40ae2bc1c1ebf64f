"""What is measured through gRPC: the first token by the caller's clock, the report's sum, the process's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.served import FirstToken, ServedModel, first_token, question_prompt, serving
from benchmarks.texts import PASSWORD
from sale_prefill_client import Client
from sale_prefill_client.tokenizer import Tokenizer
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model
from tests.support import RunningServer, tokens_of


@pytest.fixture
def served(tiny_server: RunningServer) -> Iterator[ServedModel]:
    with Client(tiny_server.target) as client:
        yield ServedModel(client, os.getpid())


def test_the_first_token_of_a_prompt(served: ServedModel, tiny_server: RunningServer) -> None:
    prompt = tokens_of(600)
    before = len(list(served.client.list_sessions()))
    run = first_token(served, prompt, answer_tokens=5)
    assert 1 <= len(run.answer_ids) <= 5
    assert 0 < run.prefill_seconds < run.seconds
    assert run.stats.computed_tokens == 600
    assert 0 < run.reported_seconds <= run.prefill_seconds
    assert first_token(served, prompt, answer_tokens=5).answer_ids == run.answer_ids
    assert len(list(served.client.list_sessions())) == before


def test_what_the_report_leaves_out_counts_either_way() -> None:
    stats: Any = SimpleNamespace(queue_seconds=1.0, estimation_seconds=2.0, attention_seconds=3.0, other_seconds=4.0)
    for wall_seconds, share in ((10.0, 0.0), (12.5, 0.2), (8.0, 0.25)):
        assert FirstToken(20.0, wall_seconds, stats, (1,)).unreported_share == pytest.approx(share)


def test_peak_memory_can_be_forgotten(served: ServedModel) -> None:
    block = bytearray(os.urandom(1)) * (64 << 20)
    size = len(block)
    peak = served.memory_bytes("VmHWM")
    del block
    served.forget_peak()
    assert served.memory_bytes("VmHWM") <= peak - size // 2
    assert served.memory_bytes("VmRSS") > 0
    with pytest.raises(RuntimeError, match="no VmNothing"):
        served.memory_bytes("VmNothing")


def test_a_server_process_serves_and_ends(tiny_model: Path) -> None:
    with serving("--model", str(tiny_model), "--threads", "1") as served:
        assert first_token(served, tokens_of(50)).stats.computed_tokens == 50
        assert served.memory_bytes("VmRSS") > 0
    assert not Path(f"/proc/{served.process_id}").exists()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with status 1") as failure, serving("--model", str(tmp_path)):
        pass
    assert "config.json" in str(failure.value)


@pytest.mark.parametrize("num_tokens", [1200, 3000])
def test_a_question_prompt_has_the_length_asked_for(num_tokens: int) -> None:
    tokenizer = Tokenizer(resolve_model(DEFAULT_MODEL).path)
    prompt = question_prompt(num_tokens, tokenizer, PASSWORD)
    assert abs(len(prompt) - num_tokens) <= 2
    text = tokenizer.decode(prompt)
    assert PASSWORD.sentence in text
    assert PASSWORD.question in text[-300:]
