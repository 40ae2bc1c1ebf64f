"""`attn_implementation="sale"` on tiny random models of every promised family, against transformers' own sdpa."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sale_attention import (
    AttentionResult,
    AttentionStatistics,
    KvView,
    LayerPolicy,
    LayerState,
    SaleConfig,
    attend,
)
from sale_attention.transformers_integration import (
    AttentionContext,
    attention_context,
    register,
    sale_attention_forward,
    sale_mask,
)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 48
SMALL = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2, every other layer windowed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral, windowed": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "phi3, windowed": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=WINDOW)),
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_model(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def prompt(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def with_both(model: Any, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    model.set_attn_implementation("sdpa")
    sdpa = call()
    model.set_attn_implementation("sale")
    return sdpa, call()


def everything_kept(config: SaleConfig = SMALL) -> AttentionContext:
    """Sparse machinery, no sparsity: a threshold so low that every block is kept."""
    return AttentionContext(config=config, policies=[LayerPolicy.uniform(4, tau=1e-30)] * 2)


@pytest.mark.parametrize("name", MODELS)
def test_dense_logits_of_a_whole_prompt_are_those_of_sdpa(name: str) -> None:
    model = make_model(name)
    ids = prompt(200)
    with attention_context(AttentionContext(dense=True)):
        sdpa, sale = with_both(model, lambda: model(ids).logits)
    if "windowed" in name:
        torch.testing.assert_close(sale, sdpa, atol=2e-2, rtol=2e-2)
    else:
        assert torch.equal(sale, sdpa)


@pytest.mark.parametrize("name", MODELS)
def test_sparse_logits_with_every_block_kept_are_those_of_sdpa(name: str) -> None:
    model = make_model(name, torch.float32)
    ids = prompt(300, batch=2)
    with attention_context(everything_kept()):
        sdpa, sale = with_both(model, lambda: model(ids).logits)
    torch.testing.assert_close(sale, sdpa, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_is_that_of_sdpa_without_any_context(name: str) -> None:
    model = make_model(name)
    ids = prompt(150)
    generate = lambda: model.generate(ids, max_new_tokens=12, do_sample=False)  # noqa: E731
    sdpa, sale = with_both(model, generate)
    assert torch.equal(sale, sdpa)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_behind_a_cache_give_what_the_whole_gives(name: str) -> None:
    model = make_model(name, torch.float32)
    model.set_attn_implementation("sale")
    ids = prompt(400)
    policies = [LayerPolicy.uniform(4, tau=0.7, query_stride=2)] * 2
    outputs, densities = [], []
    for chunk in (400, 128):
        states = [LayerState() for _ in policies]
        statistics = AttentionStatistics()
        context = AttentionContext(SMALL, policies, states, prompt_end=400, statistics=statistics)
        cache = DynamicCache(config=model.config)
        with attention_context(context):
            parts = [model(ids[:, s : s + chunk], past_key_values=cache).logits for s in range(0, 400, chunk)]
        outputs.append(torch.cat(parts, dim=1))
        densities.append(statistics.density)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
    if "windowed" not in name:
        assert densities[0] == densities[1] < 0.95


@pytest.mark.parametrize("name", ["llama", "mistral, windowed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_those_of_sdpa(name: str, side: str) -> None:
    model = make_model(name)
    ids, mask = prompt(120, batch=2), torch.ones(2, 120, dtype=torch.long)
    padding = slice(0, 50) if side == "left" else slice(70, 120)
    mask[0, padding] = 0
    statistics = AttentionStatistics()
    with attention_context(AttentionContext(statistics=statistics)):
        sdpa, sale = with_both(model, lambda: model(ids, attention_mask=mask).logits)
    assert torch.equal(sale, sdpa)
    assert statistics.dense_rows["unsupported"] == 2 * 4 * 2 * 120
    if side == "left":
        sdpa, sale = with_both(
            model, lambda: model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        )
        assert torch.equal(sale, sdpa)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = make_model("llama")
    ids = prompt(100)
    positions = torch.cat([torch.arange(60), torch.arange(40)])[None]
    sdpa, sale = with_both(model, lambda: model(ids, position_ids=positions, use_cache=False).logits)
    assert torch.equal(sale, sdpa)


def test_static_cache_generation_is_that_of_sdpa() -> None:
    model = make_model("llama")
    ids = prompt(70)
    sdpa, sale = with_both(
        model, lambda: model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    )
    assert torch.equal(sale, sdpa)


def test_a_custom_four_dimensional_mask_is_obeyed() -> None:
    model = make_model("llama")
    ids = prompt(50)
    mask = torch.ones(50, 50, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 20:, 5] = False
    sdpa, sale = with_both(model, lambda: model(ids, attention_mask=mask).logits)
    assert torch.equal(sale, sdpa)


@pytest.mark.parametrize(("past", "rows"), [(0, 100), (70, 30), (99, 1)])
@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 100, dtype=torch.bool)])
def test_no_mask_is_built_for_unpadded_input(past: int, rows: int, attention_mask: Tensor | None) -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": rows, "kv_length": 100, "q_offset": past}
    assert sale_mask(**arguments, attention_mask=attention_mask) is None
    assert sale_mask(**arguments, attention_mask=attention_mask, local_size=20) is None


def test_a_mask_is_built_for_padding_and_for_keys_past_the_query() -> None:
    hidden = torch.ones(1, 100, dtype=torch.bool)
    hidden[0, 3] = False
    masks = [
        sale_mask(1, 30, 100, q_offset=70, attention_mask=hidden),
        sale_mask(1, 30, 128, q_offset=70),
        sale_mask(1, 30, 128, q_offset=70, attention_mask=torch.ones(1, 100, dtype=torch.bool)),
    ]
    for mask in masks:
        assert mask is not None
        assert mask.shape[2] == 30
    assert masks[0] is not None
    assert not bool(masks[0][0, 0, :, 3].any())
    assert masks[1] is not None
    assert not bool(masks[1][0, 0, :, 100:].any())


def test_a_window_that_no_sequence_can_outgrow_does_not_stop_sale() -> None:
    config = Phi3Config(**SIZES, sliding_window=4096)
    torch.manual_seed(0)
    model: Any = Phi3ForCausalLM(config).eval()
    model.set_attn_implementation("sale")
    statistics = AttentionStatistics()
    policies = [LayerPolicy.uniform(4, 1e9)] * 2
    with attention_context(AttentionContext(SMALL, policies, statistics=statistics)):
        model(prompt(300))
    assert statistics.dense_rows["unsupported"] == 0
    assert statistics.density < 0.95


def test_one_row_is_dense_outside_a_context_and_as_told_inside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []

    def recording_attend(query: Tensor, kv: KvView, **arguments: Any) -> AttentionResult:
        calls.append((query.shape[2], arguments["dense"]))
        return attend(query, kv, **arguments)

    monkeypatch.setattr("sale_attention.transformers_integration.attend", recording_attend)
    model = make_model("llama")
    model.set_attn_implementation("sale")
    cache = DynamicCache(config=model.config)
    model(prompt(20), past_key_values=cache)
    model(prompt(1), past_key_values=cache)
    # A server's one-row chunk may end a prompt, so the context decides.
    for dense in (False, True):
        with attention_context(AttentionContext(dense=dense)):
            model(prompt(1), past_key_values=cache)
    assert calls[::2] == [(20, False), (1, True), (1, False), (1, True)]


def test_layers_report_in_order_and_an_exception_ends_the_pass() -> None:
    model = make_model("llama")
    model.set_attn_implementation("sale")
    seen: list[int] = []
    with attention_context(AttentionContext(on_layer=seen.append)):
        model(prompt(20))
    assert seen == [0, 1]

    class CancelledError(Exception):
        pass

    def cancel(layer: int) -> None:
        seen.append(layer)
        raise CancelledError

    with attention_context(AttentionContext(on_layer=cancel)), pytest.raises(CancelledError):
        model(prompt(20))
    assert seen == [0, 1, 0]


def test_a_context_ends_with_its_block_and_stays_in_its_thread() -> None:
    model = make_model("llama")
    model.set_attn_implementation("sale")
    mine, other = AttentionStatistics(), AttentionStatistics()

    def elsewhere() -> None:
        with torch.inference_mode(), attention_context(AttentionContext(statistics=other)):
            model(prompt(30))

    with attention_context(AttentionContext(statistics=mine)):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        model(prompt(20))
    model(prompt(40))
    assert mine.rows == 20 * 4 * 2
    assert other.rows == 30 * 4 * 2


def test_what_is_not_supported_is_refused_with_the_way_out() -> None:
    model = make_model("llama")
    model.set_attn_implementation("sale")
    with pytest.raises(ValueError, match=r'output_attentions.*attn_implementation="eager"'):
        model(prompt(20), output_attentions=True)
    states = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r'attention sinks.*attn_implementation="eager"'):
        sale_attention_forward(model, states, states, states, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match=r'soft-capped.*attn_implementation="eager"'):
        sale_attention_forward(model, states, states, states, None, softcap=30.0)
    with pytest.raises(ValueError, match=r'continuous batching; use attn_implementation="sdpa"'):
        sale_attention_forward(model, states, states, states, None, cache=object())
    with pytest.raises(ValueError, match=r'2 rows behind a cache of 2 tokens; use attn_implementation="eager"'):
        sale_attention_forward(model, states[:, :, 2:], states, states, None, dropout=0.1)
    context = AttentionContext(policies=[LayerPolicy.uniform(4)])
    with attention_context(context), pytest.raises(ValueError, match="no policies for layer 1; it has 1"):
        model(prompt(20))


def test_attention_without_causality_is_that_of_sdpa() -> None:
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 16, generator=generator) for n in (5, 9, 9))
    output, weights = sale_attention_forward(layer, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert weights is None
    assert torch.equal(output, expected)


def test_registering_again_changes_nothing() -> None:
    register()
    assert AttentionInterface()["sale"] is sale_attention_forward
