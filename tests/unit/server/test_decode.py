"""A decode step over static memory: the same logits as launch by launch, whatever happens to the session between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sale_attention import SaleConfig
from sale_prefill_server.engine.decode import StaticStep
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.model import LoadedModel, load_model
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings, Sequence
from sale_prefill_server.kv.pool import PAGE_TOKENS, KvPool
from tests.support import save_tiny_llama

PROMPT = list(range(3, 203))
SETTINGS = AttentionSettings(AttentionMode.DENSE, 0.004, 1)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def engine_of(model: LoadedModel, *, decode_graphs: bool = True) -> Engine:
    pool = KvPool(model.kv_shape, 1 << 28)
    return Engine(
        model, pool, SETTINGS, SaleConfig(), chunk_tokens=128, attention_backend="auto", decode_graphs=decode_graphs
    )


def opened(engine: Engine, reserved: int = 256) -> Sequence:
    sequence = engine.open(SETTINGS)
    sequence.kv.reserve(reserved)
    engine.prefill_chunk(sequence, PROMPT, prompt_end=len(PROMPT), statistics=engine.new_statistics())
    return sequence


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model, "tiny", device=torch.device("cpu"), dtype="float32")


@torch.inference_mode()
def static_tokens(step: StaticStep, sequence: Sequence, tokens: list[int]) -> list[torch.Tensor]:
    logits = []
    for token in tokens:
        step.set(token, sequence.kv)
        logits.append(step.run())
        sequence.kv.extend_to(sequence.num_tokens + 1)
    return logits


@torch.inference_mode()
def test_a_static_step_gives_the_logits_and_kv_of_a_plain_one(model: LoadedModel) -> None:
    engine = engine_of(model)
    plain, static = opened(engine), opened(engine)
    for tensor in (*engine.pool.keys, *engine.pool.values):
        tensor[static.kv.pages[-1], len(PROMPT) % PAGE_TOKENS :] = float("nan")  # what memory may hold
    tokens = [5, 6, 7, 8]
    expected = [engine.decode_token(plain, token) for token in tokens]
    logits = static_tokens(StaticStep(model, engine.pool), static, tokens)
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert static.num_tokens == plain.num_tokens == len(PROMPT) + 4
    for kind in (0, 1):
        ours, theirs = (torch.cat(sequence.kv.segments(1, kind, 0, 204)) for sequence in (static, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_truncation_and_plain_steps_mix_with_static_ones(model: LoadedModel) -> None:
    engine = engine_of(model)
    step = StaticStep(model, engine.pool)
    plain, static = opened(engine), opened(engine)
    for token in (5, 6, 7):
        engine.decode_token(plain, token)
    static_tokens(step, static, [5, 6, 9, 10])
    static.truncate(len(PROMPT) + 2)
    engine.decode_token(static, 7)
    (logits,) = static_tokens(step, static, [8])
    torch.testing.assert_close(logits, engine.decode_token(plain, 8), atol=1e-4, rtol=1e-4)


def test_attention_that_goes_elsewhere_is_noticed(tiny_model: Path) -> None:
    model = load_model(tiny_model, "tiny", device=torch.device("cpu"), dtype="float32")
    model.module.set_attn_implementation("eager")
    pool = KvPool(model.kv_shape, model.kv_shape.page_bytes)  # one page: the only shape that eager attention accepts
    kv = pool.create()
    kv.reserve(1)
    step = StaticStep(replace(model, max_sequence_tokens=PAGE_TOKENS), pool)
    step.set(5, kv)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="of 2 came through"):
        step.run()


def test_a_model_with_attention_of_its_own_gets_copies(tiny_model: Path) -> None:
    model, own = (load_model(tiny_model, "tiny", device=torch.device("cpu"), dtype="float32") for _ in range(2))
    own.module.set_attn_implementation("eager")
    ours, theirs = engine_of(model), engine_of(own)
    first, second = opened(ours), opened(theirs)
    for token in (5, 6):
        logits, expected = ours.decode_token(first, token), theirs.decode_token(second, token)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_there_are_no_graphs_on_the_cpu(model: LoadedModel) -> None:
    assert engine_of(model)._graphs is None


@pytest.fixture(scope="module")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = save_tiny_llama(tmp_path_factory.mktemp("tiny-gpu"), hidden_size=256, head_dim=64)
    return load_model(directory, "tiny", device=torch.device("cuda:0"), dtype="bfloat16")


@needs_cuda
class TestGraphs:
    def same(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=3e-2, rtol=3e-2)

    def test_graphs_give_the_logits_of_plain_decoding(self, gpu_model: LoadedModel) -> None:
        engine, eager = engine_of(gpu_model), engine_of(gpu_model, decode_graphs=False)
        sequence, plain = opened(engine), opened(eager)
        tokens = list(range(5, 25))
        self.same(
            [engine.decode_token(sequence, token) for token in tokens],
            [eager.decode_token(plain, token) for token in tokens],
        )
        assert engine._graphs is not None
        assert engine._graphs.enabled
        assert engine._graphs.captured
        assert sequence.num_tokens == plain.num_tokens

    def test_bits_do_not_depend_on_what_was_captured(self, gpu_model: LoadedModel) -> None:
        engine = engine_of(gpu_model)
        first, second = opened(engine), opened(engine)
        logits = [engine.decode_token(first, token) for token in (5, 6, 7, 8)]
        for token in (9, 9, 9):
            engine.decode_token(second, token)  # captured in other steps, and then cut back
        second.truncate(len(PROMPT))
        again = [engine.decode_token(second, token) for token in (5, 6, 7, 8)]
        assert torch.equal(torch.stack(logits), torch.stack(again))

    def test_one_graph_serves_all_sequences_and_all_lengths(self, gpu_model: LoadedModel) -> None:
        engine, eager = engine_of(gpu_model), engine_of(gpu_model, decode_graphs=False)
        sequences, plains = [opened(engine) for _ in range(5)], [opened(eager) for _ in range(2)]
        for sequence in (sequences[1], plains[1]):
            sequence.kv.reserve(512)
            engine_ = engine if sequence is sequences[1] else eager
            engine_.prefill_chunk(sequence, list(range(200, 300)), prompt_end=300, statistics=engine.new_statistics())
        for _ in range(2):
            ours = [
                [engine.decode_token(sequence, 5 + i % 2) for _ in range(2)] for i, sequence in enumerate(sequences[:2])
            ]
            theirs = [[eager.decode_token(plain, 5 + i) for _ in range(2)] for i, plain in enumerate(plains)]
            for logits, expected in zip(ours, theirs, strict=True):
                self.same(logits, expected)
        for sequence in sequences:
            sequence.release()
        last = opened(engine)  # in pages that others have left
        for token in (5, 6, 7):
            engine.decode_token(last, token)
        assert engine._graphs is not None
        assert engine._graphs.enabled

    def test_a_model_with_attention_of_its_own_is_decoded_launch_by_launch(self, gpu_model: LoadedModel) -> None:
        engine = engine_of(gpu_model)
        gpu_model.module.set_attn_implementation("sdpa")
        try:
            sequence = opened(engine)
            logits = [engine.decode_token(sequence, token) for token in (5, 6)]
        finally:
            gpu_model.module.set_attn_implementation("sale")
        assert engine._graphs is not None
        assert not engine._graphs.enabled
        eager = engine_of(gpu_model, decode_graphs=False)
        plain = opened(eager)
        self.same(logits, [eager.decode_token(plain, token) for token in (5, 6)])
