"""A captured trace is what the layer's attention was given: projected, rotated, of the heads that were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import capture_traces
from benchmarks.attention_traces import load_trace
from benchmarks.capture_traces import (
    NAME,
    Choice,
    bundled_prompt,
    capture,
    choose_heads,
    main,
    spread_layers,
    text_prompt,
)
from benchmarks.texts import PASSWORD
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model
from tests.support import save_tiny_llama, tokens_of

HEAD_DIM = 16
CHOICES = [Choice(0, 1, (3,)), Choice(1, 0, (0, 1))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = save_tiny_llama(tmp_path_factory.mktemp("capture"))
    return AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation=NAME).eval()


def attention_inputs(model: Any, token_ids: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, keys and values by layer, computed from what each attention module was called with."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def project(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = named["hidden_states"]
        shape = (*hidden.shape[:-1], -1, HEAD_DIM)
        query, keys, values = (
            projection(hidden).view(shape).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        found.append((*apply_rotary_pos_emb(query, keys, *named["position_embeddings"]), values))

    handles = [layer.self_attn.register_forward_pre_hook(project, with_kwargs=True) for layer in model.layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_what_is_captured_is_what_the_layers_computed(model: Any) -> None:
    token_ids = tokens_of(100)
    layers_done: list[int] = []
    captured = capture(model, token_ids, CHOICES, on_layer=lambda: layers_done.append(1))
    expected = attention_inputs(model, token_ids)
    assert [item.choice for item in captured] == CHOICES
    assert len(layers_done) == len(expected) == 2
    for item in captured:
        query, keys, values = expected[item.choice.layer]
        assert item.query.equal(query[0, list(item.choice.query_heads)])
        assert item.keys.equal(keys[0, item.choice.kv_head : item.choice.kv_head + 1])
        assert item.values.equal(values[0, item.choice.kv_head : item.choice.kv_head + 1])
        assert item.scale == pytest.approx(HEAD_DIM**-0.5)
        assert item.keys.untyped_storage().nbytes() == item.keys.nbytes


def test_capturing_does_not_change_what_the_model_computes(model: Any) -> None:
    token_ids = torch.tensor([tokens_of(100)])
    with torch.inference_mode():
        ours = model(input_ids=token_ids, use_cache=False).last_hidden_state
        model.set_attn_implementation("sdpa")
        theirs = model(input_ids=token_ids, use_cache=False).last_hidden_state
        model.set_attn_implementation(NAME)
    assert ours.equal(theirs)


def test_a_layer_with_a_sliding_window_is_refused() -> None:
    config = MistralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=32,
    )  # fmt: skip
    windowed = AutoModel.from_config(config, attn_implementation=NAME).eval()
    with pytest.raises(SystemExit, match="sliding window of 32"):
        capture(windowed, tokens_of(40), [Choice(0, 0, (0, 1))])


def test_layers_are_spread_evenly() -> None:
    assert spread_layers(30) == [3, 11, 18, 26]
    assert spread_layers(2) == [0, 1]


def eight_layers_of_six_heads() -> LlamaConfig:
    return LlamaConfig(hidden_size=96, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2)


def test_heads_default_to_the_group_of_the_kv_head() -> None:
    config = eight_layers_of_six_heads()
    assert choose_heads(config, [5], [1], None) == [Choice(5, 1, (3, 4, 5))]
    assert choose_heads(config, [5], [0, 1], [0, 2, 4]) == [Choice(5, 0, (0, 2)), Choice(5, 1, (4,))]
    assert [choice.layer for choice in choose_heads(config, None, [0], None)] == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8], [0], None), "--layers 8: this model's are 0 to 7"),
        (([0], [2], None), "--kv-heads 2: this model's are 0 to 1"),
        (([0], [1], [0]), "--query-heads: none of KV head 1's, 3 to 5"),
    ],
)
def test_layers_and_heads_that_are_not_there_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    config = eight_layers_of_six_heads()
    with pytest.raises(SystemExit, match=message):
        choose_heads(config, *arguments)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL).path)


def test_the_bundled_prompt_has_its_length_a_planted_sentence_and_the_question(tokenizer: Any) -> None:
    prompt = bundled_prompt(1000, tokenizer)
    text = tokenizer.decode(prompt)
    assert len(prompt) == 1000
    assert PASSWORD.sentence in text
    assert text.endswith(PASSWORD.question)


def test_a_text_is_cut_to_its_length_or_too_short(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two three " * 20)
    assert text_prompt(file, 10, tokenizer) == tokenizer.encode("one two three " * 20)[:10]
    with pytest.raises(SystemExit, match=r"say --tokens 6\d"):
        text_prompt(file, 1000, tokenizer)


def test_a_prompt_past_the_models_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="8192 at most"):
        main(["--tokens", "9000", "--out", str(tmp_path)])


def test_an_unknown_model_is_an_error_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing" / "here"), "--out", str(tmp_path)]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_files_that_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", "300", "--layers", "2", "5", "--kv-heads", "1", "--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [
        f"smollm2-135m-instruct_reference300_layer{layer}_kv1.safetensors" for layer in ("02", "05")
    ]
    assert str(files[0]) in capsys.readouterr().out
    trace = load_trace(files[1])
    assert (trace.name, trace.tokens, trace.heads, trace.head_dim) == ("layer05_kv1", 300, 3, 64)
    assert trace.query.dtype == torch.bfloat16
    assert trace.scale == pytest.approx(64**-0.5)
    assert "smollm2" in trace.model


def test_an_interrupted_capture_leaves_nothing(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with capture_traces._published_together(tmp_path) as scratch:
            (scratch / "half.safetensors").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []
