"""The client against the product's own server: text in, KV out, and everything in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from transformers import AutoModelForCausalLM

from sale_prefill_client import AsyncClient, Attention, Client, Sampling, Tokenizer, cli, errors, token_digest
from tests.support import RunningServer, running_server, save_tiny_llama, tokens_of
from tests.unit.client.texts import save_byte_tokenizer

DOCUMENT = "The quick brown fox — über alles — jumps. " * 20
PROMPT = tokens_of(900)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has a tokenizer and a chat template."""
    return save_byte_tokenizer(save_tiny_llama(tmp_path_factory.mktemp("tiny-with-text")))


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[RunningServer]:
    with running_server(model=str(model_folder), dtype="float32", chunk_tokens=512) as running:
        yield running


@pytest.fixture
def client(server: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Client(server.target) as connected:
        connected.wait_until_ready(30)
        yield connected


def greedy(model_folder: Path, token_ids: list[int], cache: Any, count: int) -> list[int]:
    """Greedy tokens of transformers alone; with a cache, `token_ids` is what follows it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            output = model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True)
            cache, token_ids = output.past_key_values, [int(output.logits[0, -1].argmax())]
            found += token_ids
    return found


class TestText:
    def test_the_served_tokenizer_is_the_models_own(self, client: Client, model_folder: Path) -> None:
        own = Tokenizer(model_folder)
        assert client.tokenizer().encode(DOCUMENT) == own.encode(DOCUMENT)
        assert client.tokenizer().chat_template == own.chat_template

    def test_text_in_is_the_texts_tokens(self, client: Client) -> None:
        ids = client.tokenizer().encode(DOCUMENT)
        session = client.prefill(text=DOCUMENT).session
        assert session.token_digest == token_digest(ids)
        appended = client.prefill(text="And?", session_id=session.session_id).session
        assert appended.token_digest == token_digest(ids + client.tokenizer().encode("And?", add_special_tokens=False))

    def test_text_out_is_the_tokens_text(self, client: Client) -> None:
        sessions = [client.prefill(text=DOCUMENT).session_id for _ in range(2)]
        sampling = Sampling(temperature=2.0, seed=5)
        ids = client.generate(sessions[0], max_new_tokens=60, sampling=sampling, ignore_eos=True).token_ids
        stream = client.decode_text(sessions[1], max_new_tokens=60, sampling=sampling, ignore_eos=True)
        assert "".join(stream) == stream.text == client.tokenizer().decode(ids)
        assert stream.token_ids == ids
        assert stream.result is not None

    def test_a_second_turn_prefills_only_what_is_new(self, client: Client) -> None:
        tokenizer = client.tokenizer()
        first = tokenizer.apply_chat_template([{"role": "user", "content": DOCUMENT}], tokenize=True)
        session_id = client.prefill(first).session_id
        answer = client.generate(session_id, max_new_tokens=8)
        ended = answer.result.finish_reason == "stop"
        next_turn = tokenizer.chat_continuation([{"role": "user", "content": "Why?"}], reply_ended=ended)
        ids = tokenizer.encode(next_turn, add_special_tokens=False)
        held = answer.result.session.num_tokens
        second = client.generate(session_id, ids, max_new_tokens=4, expected_prefix_tokens=held)
        stats = second.result.stats.prefill
        assert stats is not None
        assert stats.cached_tokens + stats.computed_tokens == held + len(ids)
        assert stats.computed_tokens <= len(ids) + 1  # the answer's last token has no KV before the next turn


class TestKv:
    @pytest.mark.parametrize("layout", ["THD", "HTD"])
    def test_plain_transformers_goes_on_from_pulled_kv_with_the_same_tokens(
        self, client: Client, model_folder: Path, layout: Any
    ) -> None:
        result = client.prefill(PROMPT, attention=Attention.dense())
        pulled = client.pull_kv(result.session_id, layout=layout, chunk_bytes=64 << 10)
        assert pulled.token_digest == token_digest(PROMPT)
        assert pulled.generation == result.session.generation
        first = result.top_logits[0].token_id
        here = [first, *greedy(model_folder, [first], pulled.to_dynamic_cache(), 31)]
        there = client.generate(result.session_id, max_new_tokens=32, ignore_eos=True).token_ids
        assert here == there == greedy(model_folder, PROMPT, None, 32)

    def test_a_part_is_the_part_of_the_whole(self, client: Client) -> None:
        session_id = client.prefill(PROMPT).session_id
        whole = client.pull_kv(session_id)
        part = client.pull_kv(session_id, token_range=(100, 700), layer_range=(1, None), checksum="xxh3_64")
        assert (part.token_start, part.token_end, part.layer_start, part.layer_end) == (100, 700, 1, 2)
        assert torch.equal(part.torch(), whole.torch()[1:, :, 100:700])

    def test_an_older_generation_is_refused(self, client: Client) -> None:
        session = client.prefill(PROMPT).session
        client.prefill([5], session_id=session.session_id)
        with pytest.raises(errors.GenerationMismatchError):
            client.pull_kv(session.session_id, generation=session.generation)


class TestSessions:
    def test_a_repeat_gets_the_result_and_computes_nothing(self, client: Client) -> None:
        first = client.prefill(PROMPT)
        again = client.prefill(PROMPT, request_id=first.request_id)
        assert again.session_id == first.session_id
        assert again.session.num_tokens == len(PROMPT)

    def test_the_life_of_a_session(self, client: Client) -> None:
        session = client.prefill(PROMPT, lease_seconds=60, labels={"a": "b"}).session
        assert (session.state, session.labels, session.lease_seconds) == ("ready", {"a": "b"}, 60)
        renewed = client.renew_sessions([session.session_id, "no-such"], lease_seconds=300)
        assert renewed.missing_session_ids == ("no-such",)
        assert renewed.renewed[0].remaining_lease_seconds == pytest.approx(300, abs=5)
        updated = client.update_session(session.session_id, sliding=True, labels={})
        assert (updated.sliding, updated.labels, updated.lease_seconds) == (True, {}, 60)
        assert session.session_id in [each.session_id for each in client.list_sessions(page_size=1)]
        assert client.delete_session(session.session_id) == session.size_bytes
        assert client.delete_session(session.session_id, allow_missing=True) == 0
        with pytest.raises(errors.SessionUnknownError):
            client.get_session(session.session_id)

    def test_wrong_requests_have_their_own_errors(self, client: Client) -> None:
        session_id = client.prefill([5, 6, 7]).session_id
        with pytest.raises(errors.PrefixMismatchError) as mismatch:
            client.prefill([8], session_id=session_id, expected_prefix_tokens=2)
        assert mismatch.value.metadata["num_tokens"] == "3"
        with pytest.raises(errors.AttentionMismatchError):
            client.prefill([8], session_id=session_id, attention=Attention.dense())
        with pytest.raises(errors.ContextExceededError, match="4096"):
            client.prefill([5] * 5000)
        with pytest.raises(errors.InvalidSamplingError):
            client.generate(session_id, sampling=Sampling(temperature=-1.0))
        with pytest.raises(errors.InvalidFieldError, match="99 of a session that holds 3"):
            client.fork_session(session_id, num_tokens=99)
        assert client.get_session(session_id).num_tokens == 3

    async def test_the_async_client_does_the_same(self, server: RunningServer, client: Client) -> None:
        blocking = client.generate(client.prefill(PROMPT).session_id, max_new_tokens=8, ignore_eos=True)
        async with AsyncClient(server.target) as asynchronous:
            result = await asynchronous.prefill(PROMPT)
            async with asynchronous.decode(result.session_id, max_new_tokens=8, ignore_eos=True) as stream:
                assert [token.token_id async for token in stream] == blocking.token_ids
            pulled = await asynchronous.pull_kv(result.session_id)
            assert pulled.num_tokens == (await asynchronous.get_session(result.session_id)).num_tokens
            await asynchronous.delete_session(result.session_id)


class TestCommandLine:
    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
        assert cli.main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def test_a_document_a_question_and_its_kv(
        self,
        server: RunningServer,
        client: Client,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("SALE_PREFILL_TARGET", server.target)
        (tmp_path / "document.txt").write_text(DOCUMENT)
        assert self.run(capsys, "info", "--wait", "30s")["vocabulary_size"] == 320
        prefilled = self.run(capsys, "prefill", str(tmp_path / "document.txt"), "--chat", "--lease", "10m")
        session_id = prefilled["session"]["session_id"]
        answer = self.run(capsys, "decode", session_id, "-n", "8", "--ignore-eos")
        assert len(answer["token_ids"]) == 8
        words = ("decode", session_id, "--prompt", "Why?", "--chat", "--close-answer", "-n", "2", "--ignore-eos")
        assert self.run(capsys, *words)["stats"]["prefill"]["cached_tokens"] > 0
        assert self.run(capsys, "sessions", "get", session_id)["session_id"] == session_id
        pulled = self.run(capsys, "pull", session_id, "-o", str(tmp_path / "kv.safetensors"), "--layers", "1:")
        with safetensors.safe_open(tmp_path / "kv.safetensors", "pt") as file:
            assert sorted(file.keys()) == ["layers.1.key", "layers.1.value"]
            assert torch.equal(file.get_tensor("layers.1.key"), client.pull_kv(session_id).layer(1)[0])
            assert file.metadata()["token_digest"] == pulled["token_digest"]
        self.run(capsys, "pull", session_id, "-o", str(tmp_path / "whole.safetensors"), "--stripes", "2")
        copied = self.run(capsys, "push", str(tmp_path / "whole.safetensors"), "--session", "copy", "--label", "a=b")
        assert (copied["session"]["session_id"], copied["session"]["labels"]) == ("copy", {"a": "b"})
        assert copied["session"]["attention"] == self.run(capsys, "sessions", "get", session_id)["attention"]
        answers = [self.run(capsys, "decode", name, "-n", "8", "--ignore-eos") for name in ("copy", session_id)]
        assert answers[0]["token_ids"] == answers[1]["token_ids"]
        assert cli.main(["push", str(tmp_path / "document.txt")]) == 2
        assert "document.txt is damaged" in capsys.readouterr().err
        assert self.run(capsys, "sessions", "delete", session_id)[0]["freed_bytes"] > 0
        assert cli.main(["sessions", "get", session_id]) == 5
