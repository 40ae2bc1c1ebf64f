"""The GPU benchmark of the service, on a tiny model on the CPU: traces in place of queries and keys, rows, answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_traces import save_trace
from benchmarks.gpu_rows import Row
from benchmarks.gpu_server import RandomLlama, TiledTrace, TraceInjection, child_server
from benchmarks.gpu_service import TINY, _comparison, measure_large_model
from sale_prefill_client import DecodedToken
from sale_prefill_client.results import TokenLogit

TRACE_TOKENS = 768
MODEL = replace(TINY, head_dim=64, context=4096)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        query = (4 + torch.randn(3, TRACE_TOKENS, 64, generator=generator)).bfloat16()
        keys, values = torch.randn(2, 1, TRACE_TOKENS, 64, generator=generator).bfloat16()
        keys[:, :32] += 4  # all rows look at the sink, so that most blocks are skipped
        save_trace(tmp_path / f"layer{layer}.safetensors", query, keys, values, {"scale": "1/sqrt(64)"})
    return tmp_path


@pytest.mark.parametrize("start", [0, 5, 10, 23])
def test_a_trace_is_met_again_from_its_start(start: int) -> None:
    source = torch.arange(10.0).view(1, 1, 10, 1).expand(1, 2, 10, 2)
    target = torch.zeros(1, 3, 25, 2)
    TiledTrace(source, [0, 1, 0], rope_theta=None).write(target, start)
    assert torch.equal(target[0, 2, :, 0], (torch.arange(25) + start).remainder(10).float())


def test_a_trace_met_again_stands_where_rotary_embedding_would_have_put_it() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 1, 40, 64, generator=generator)
    angles = torch.outer(torch.arange(120.0), 1e4 ** -(torch.arange(0, 64, 2) / 64))
    cosine, sine = (torch.cat((part, part), dim=1)[None] for part in (angles.cos(), angles.sin()))
    repeated, _ = apply_rotary_pos_emb(plain.repeat(1, 1, 3, 1), plain.repeat(1, 1, 3, 1), cosine, sine)
    target = torch.zeros(1, 2, 90, 64)
    TiledTrace(repeated[:, :, :40], [0, 0], rope_theta=1e4).write(target, 20)
    torch.testing.assert_close(target[:, 1:], repeated[:, :, 20:110], atol=1e-5, rtol=1e-5)


def test_prefill_sees_the_traces_and_decode_the_models_own(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # undone after
    model = replace(MODEL, traces=tuple(sorted(traces.glob("*.safetensors"))), turn_tiles=False)
    loaded = model.build(torch.device("cpu"))
    with torch.inference_mode():
        cache = loaded.module(torch.arange(500)[None], use_cache=True).past_key_values
        cache = loaded.module(torch.arange(500)[None], past_key_values=cache, use_cache=True).past_key_values
        cache = loaded.module(torch.tensor([[7]]), past_key_values=cache, use_cache=True).past_key_values
    injection = TraceInjection(model, torch.device("cpu"))
    for layer in range(2):
        expected = injection._keys[layer]._rounds[0][0, 0]
        for head in range(MODEL.kv_heads):
            keys = cache.layers[layer].keys[0, head]
            assert torch.equal(keys[:1000], expected[torch.arange(1000) % TRACE_TOKENS])
            assert not torch.equal(keys[1000], expected[1000 % TRACE_TOKENS])


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(SystemExit, match="no-such-model"), child_server({"model": "no-such-model", "device": "cpu"}):
        pass


@pytest.mark.slow
def test_the_large_model_in_small(traces: Path) -> None:
    rows = measure_large_model([1500, 2100], device="cpu", model=MODEL, traces=traces, decode_tokens=3, strides=[2])
    assert [row.line.split(",")[0] for row in rows] == [
        *(["1K prompt", "... phases", "... phases", "2K prompt", "... phases", "... phases"]),
        *["decode after a 1K prompt (dense)", "decode after a 1K prompt (SALE stride 2)"],
    ]
    run = rows[3].details["SALE stride 2"][0]
    assert run["density"] < 1
    phases = run["phase_seconds"]
    assert all(phases[name] > 0 for name in ("quantise", "sink_local", "select", "compute", "other"))
    assert sum(phases.values()) == pytest.approx(run["first_token_seconds"], rel=0.01)


def answer(*tokens: tuple[int, float]) -> list[DecodedToken]:
    best = (TokenLogit(1, 0.0, -0.5), TokenLogit(2, 0.0, -0.75))
    return [DecodedToken(token, logprob, best) for token, logprob in tokens]


@pytest.mark.parametrize(
    ("got", "same", "gap"),
    [([1, 1, 1], 3, None), ([1, 2, 1], 1, 0.25), ([1, 9, 1], 1, None), ([1, 1], 2, None)],
)
def test_where_answers_part(got: list[int], same: int, gap: float | None) -> None:
    expected = answer((1, -0.5), (1, -0.5), (1, -0.5))
    found = _comparison("x", "SALE", [expected, answer(*((token, -0.5) for token in got))], ["a b", "b"], "b")
    assert (found.same_tokens, found.gap, found.same) == (same, gap, got == [1, 1, 1])
    assert found.right
    assert found.margin == 0.25


def test_a_row_for_other_programs() -> None:
    row: dict[str, Any] = Row("what", ">= 1", "2", "3", True).as_json()
    assert row == {"line": "what", "required": ">= 1", "aim": "2", "measured": "3", "pass": True, "details": {}}


def test_the_shape_of_the_8b_model() -> None:
    from benchmarks.gpu_service import LLAMA_8B

    kv_bytes = 2 * 2 * LLAMA_8B.layers * LLAMA_8B.kv_heads * LLAMA_8B.head_dim * 131_072
    assert kv_bytes == 16 * 2**30
    assert isinstance(LLAMA_8B, RandomLlama)
