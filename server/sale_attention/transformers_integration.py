"""`attn_implementation="sale"` for transformers >= 5: any Llama-, Qwen-, Mistral- or Phi-3-style causal LM, unpatched.

Importing this module registers it. Used as it is, prompts run with default settings (`SaleConfig()`, tau 0.004 for
every head) and decoding runs dense. A server wraps each forward pass in `attention_context` to set policies, states,
statistics and cancellation for one request.

No mask is built for unpadded causal input: the mask function registered here returns None, and the attention function
knows causality and sliding windows by itself. Inputs that do need a mask (padding, packed sequences, static caches,
prefix masks) get transformers' own mask and run through transformers' SDPA, with the same results as
`attn_implementation="sdpa"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .attention import attend
from .audit import Audit
from .backends import AUTO
from .config import LayerPolicy, SaleConfig
from .decode import DecodeStep, decode_attention
from .kv_view import KvView
from .state import LayerState
from .statistics import AttentionStatistics

NAME = "sale"

_T = TypeVar("_T")


@dataclass(frozen=True)
class AttentionContext:
    """Settings of one request's forward passes.

    Attributes:
        config: block geometry and code width.
        policies: one a layer, by index or as a mapping; None for the uniform default.
        states: one a layer, by index or as a mapping; None quantises all keys again in every call.
        dense: run every layer dense.
        prompt_end: absolute end of the prompt being prefilled; needed where a prompt comes in chunks and a policy has
            a query stride above 1. None takes the end of each call.
        statistics: where layers report their costs.
        on_layer: called with the layer's index after its attention; an exception it raises ends the forward pass.
        backend: name of the attention backend.
        audit: looks at tiles of sparse rows; changes no result.
        decode: the pass is one decode step over caches that return all of their capacity; lengths are on the device.
        page_table: int64 `[B, pages]` where caches return pages `[pages, Hkv, page_tokens, d]`, as in `KvView`.
        tokens: with a page table, keys that each sequence has when this pass is done.
    """

    config: SaleConfig = field(default_factory=SaleConfig)
    policies: Sequence[LayerPolicy] | Mapping[int, LayerPolicy] | None = None
    states: Sequence[LayerState] | Mapping[int, LayerState] | None = None
    dense: bool = False
    prompt_end: int | None = None
    statistics: AttentionStatistics | None = None
    on_layer: Callable[[int], None] | None = None
    backend: str = AUTO
    audit: Audit | None = None
    decode: DecodeStep | None = None
    page_table: Tensor | None = None
    tokens: int = 0

    def view(self, key: Tensor, value: Tensor) -> KvView:
        """What a layer's cache returned."""
        return KvView(key, value) if self.page_table is None else KvView(key, value, self.page_table, self.tokens)


_DEFAULT_CONTEXT = AttentionContext()
_current: ContextVar[AttentionContext] = ContextVar("sale_attention_context", default=_DEFAULT_CONTEXT)


@contextmanager
def attention_context(context: AttentionContext) -> Iterator[None]:
    """Apply `context` to every model call inside the block, in this thread (or asyncio task)."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def register() -> None:
    """Make `attn_implementation="sale"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, sale_attention_forward)
    AttentionMaskInterface.register(NAME, sale_mask)


def sale_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface: None where causality (and a sliding window) says it all, else `sdpa_mask`'s mask.

    A windowed layer passes `sliding_window` to the attention function, on which FlashAttention relies as well.
    Chunked attention (`attention_chunk_size`) does not, so it gets a mask.
    """
    causal_alone = (
        allow_is_causal_skip
        and not allow_is_bidirectional_skip
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and getattr(kwargs.get("config"), "attention_chunk_size", None) is None
        and not _has_padding(attention_mask, kv_offset, kv_offset + kv_length)
    )
    if causal_alone:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        # Always an explicit mask, so that "no mask" can only mean "causal, aligned to the last key".
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    return mask


def sale_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        module: the model's attention layer; its `layer_idx` picks policy and state.
        query: `[B, H, Nq, d]` after rotary embedding.
        key: `[B, Hkv, Nk, d]`, past and present; pages where the context has a page table.
        value: `[B, Hkv, Nk, d_v]`, or pages.
        attention_mask: None for plain causal attention; else a 4D mask, which sends the call to SDPA.
        dropout: training only; sends the call to SDPA.
        scaling: softmax scale.
        is_causal: False sends the call to SDPA.
        sliding_window: tokens a row sees, itself included; the layer runs dense.

    Returns:
        `[B, Nq, H, d_v]` and None for the weights, which are never formed.

    Raises:
        ValueError: for a feature that neither SALE nor SDPA has, naming the implementation that has it; for one that a
            decode step with lengths on the device does not have.
    """
    _refuse_unsupported(kwargs)
    context = _current.get()
    layer = getattr(module, "layer_idx", 0)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if context.decode is not None:
        window = _active_window(module, context.decode.view(key, value).tokens, sliding_window)
        if attention_mask is not None or not causal or dropout > 0 or window is not None:
            raise ValueError("a decode step with lengths on the device knows no mask, dropout or sliding window")
        output = _decode(context.decode, query, key, value, scaling)
    elif attention_mask is not None or not causal or dropout > 0 or kwargs.get("position_bias") is not None:
        kv = context.view(key, value).gathered()
        if attention_mask is None and causal and 1 < query.shape[2] < kv.tokens:
            raise ValueError(
                f'attn_implementation="{NAME}" has neither dropout nor position bias for {query.shape[2]} rows behind '
                f'a cache of {kv.tokens - query.shape[2]} tokens; use attn_implementation="eager"'
            )
        output, _ = sdpa_attention_forward(
            module, query, kv.keys, kv.values, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        if context.statistics is not None:
            batch, heads, rows, _ = query.shape
            context.statistics.count_rows(rows, batch * heads)
            context.statistics.count_dense(rows, batch * heads, "unsupported", "mask, dropout or no causality")
    else:
        kv = context.view(key, value)
        output = _attend(context, layer, query, kv, scaling, _active_window(module, kv.tokens, sliding_window))
    if context.on_layer is not None:
        context.on_layer(layer)
    return output, None


def _attend(
    context: AttentionContext, layer: int, query: Tensor, kv: KvView, scaling: float | None, window: int | None
) -> Tensor:
    result = attend(
        query,
        kv,
        policy=_of_layer(context.policies, layer, "policies"),
        config=context.config,
        state=_of_layer(context.states, layer, "states"),
        scale=scaling,
        prompt_end=context.prompt_end,
        statistics=context.statistics,
        layer=layer,
        backend=context.backend,
        # Outside a context one row is a decoded token: it reads all keys once whatever is selected. Inside one it may
        # be the last chunk of a prompt, which must come out as it would in a longer chunk; the caller says.
        dense=context.dense or (query.shape[2] == 1 and context is _DEFAULT_CONTEXT),
        window=window,
        return_lse=False,
        audit=context.audit,
    )
    return result.output.transpose(1, 2).contiguous()


def _decode(step: DecodeStep, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    kv = step.view(key, value)
    return decode_attention(query, kv, step.lengths, scale=scaling, return_lse=False).output.transpose(1, 2)


def _active_window(module: nn.Module, tokens: int, sliding_window: int | None) -> int | None:
    """The layer's window if a sequence of this model can outgrow it.

    Decided by the model's config, not by today's length, so that a prompt's first rows do not change when it grows.
    """
    if sliding_window is None:
        return None
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    outgrown = longest is None or longest > sliding_window or tokens > sliding_window
    return sliding_window if outgrown else None


def _refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    features = {
        "softcap": "soft-capped attention scores",
        "s_aux": "attention sinks (s_aux)",
        "output_attentions": "returning attention weights (output_attentions)",
    }
    for name, feature in features.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f'attn_implementation="{NAME}" does not support {feature}; load the model with '
                f'attn_implementation="eager"'
            )
    if kwargs.get("cache") is not None:
        raise ValueError(
            f'attn_implementation="{NAME}" does not run in transformers\' continuous batching; use '
            f'attn_implementation="sdpa" there'
        )


def _has_padding(attention_mask: Tensor | None, start: int, end: int) -> bool:
    """Whether a 2D padding mask hides any of the keys `[start, end)`; keys past its end are hidden."""
    if attention_mask is None:
        return False
    return attention_mask.shape[-1] < end or not bool(attention_mask[:, start:end].all())


def _of_layer(items: Sequence[_T] | Mapping[int, _T] | None, layer: int, name: str) -> _T | None:
    if items is None:
        return None
    try:
        return items[layer]
    except (KeyError, IndexError):
        raise ValueError(f"the attention context has no {name} for layer {layer}; it has {len(items)}") from None


register()
