"""Attention's inputs, outputs and gradients of one prompt, a layer at a time and never more than one.

The gradient says what an error of attention does to the model. With next tokens y_t drawn from the model's own
predictions and g the gradient of sum_t log p(y_t) with respect to a head's outputs, errors delta of those outputs move
the predictions by a divergence of about half of E[(g . delta)^2] (the Fisher information), summed over the prompt.

Memory: hidden states between layers, [tokens, hidden] each, and the graph of one layer, which is run again when the
gradient reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from sale_attention.transformers_integration import (
    NAME as SALE,
)
from sale_attention.transformers_integration import (
    AttentionContext,
    attention_context,
    sale_attention_forward,
    sale_mask,
)

from ..models import FidelityModel

NAME = "sale-observed"


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """One layer's attention on one prompt, on the model's device and in its dtype.

    Attributes:
        layer: its index.
        query: `[1, H, N, d]`, after rotary embedding.
        keys: `[1, Hkv, N, d]`.
        values: `[1, Hkv, N, d_v]`.
        scale: softmax scale.
        output: `[1, N, H, d_v]`, dense.
        gradient: of the outputs, same shape; None where none was asked for.
    """

    layer: int
    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    output: Tensor
    gradient: Tensor | None = None

    def with_gradient(self, gradient: Tensor) -> LayerCapture:
        """This capture without its graph, and with `gradient`."""
        tensors = (self.query, self.keys, self.values)
        query, keys, values = (tensor.detach() for tensor in tensors)
        return LayerCapture(self.layer, query, keys, values, self.scale, self.output.detach(), gradient)


_Observer = Callable[[LayerCapture], None]
_observer: ContextVar[_Observer | None] = ContextVar("attention_observer", default=None)


def observed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: SALE's, which shows what it was given and made to whoever is observing."""
    output, _ = sale_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    observe = _observer.get()
    if observe is not None:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        observe(LayerCapture(int(module.layer_idx), query, key, value, scale, output))  # type: ignore[arg-type]
    return output, None


AttentionInterface.register(NAME, observed_attention_forward)
AttentionMaskInterface.register(NAME, sale_mask)


def forward_layers(model: FidelityModel, token_ids: Sequence[int], observe: Callable[[LayerCapture], None]) -> None:
    """Runs a prompt dense and shows each layer's attention to `observe`, first layer first, without gradients."""
    with torch.inference_mode(), _observing(model, observe):
        model.hidden_states(token_ids)


def backward_layers(model: FidelityModel, token_ids: Sequence[int], seed: int) -> Iterator[LayerCapture]:
    """Runs a prompt dense and yields each layer's attention with its gradient, last layer first.

    Args:
        model: what to run; its parameters take no gradients.
        token_ids: the prompt.
        seed: of the drawn next tokens, the same on every machine with the same predictions.
    """
    layers = decoder_layers(model)
    with torch.enable_grad():
        calls, last, final = _forward_keeping_calls(model, layers, token_ids)
        gradient = _gradient_of_drawn_tokens(model, last, final, seed)
        del last, final
        for index in reversed(range(len(layers))):
            capture, gradient = _run_again(model, layers[index], calls.pop(), gradient)
            yield capture


def decoder_layers(model: FidelityModel) -> list[nn.Module]:
    """The decoder's layers, first to last.

    Raises:
        ValueError: the architecture keeps them in no one list.
    """
    decoder = model.module.get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.num_layers:
            return list(module)
    raise ValueError(
        f"{type(decoder).__name__} has no list of {model.num_layers} layers, so it cannot be calibrated; serve it with "
        "--profile none and a --threshold, or --attention dense"
    )


@dataclass
class _Call:
    """How a layer was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def repeat(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        if self.args:
            return _hidden_of(layer(hidden, *self.args[1:], **self.kwargs))
        return _hidden_of(layer(**{**self.kwargs, "hidden_states": hidden}))


def _hidden_of(result: Any) -> Tensor:
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def _forward_keeping_calls(
    model: FidelityModel, layers: Sequence[nn.Module], token_ids: Sequence[int]
) -> tuple[list[_Call], Tensor, Tensor]:
    """Each layer's call, the last layer's output as a leaf, and the final hidden states `[tokens, hidden]` of it.

    Nothing before that leaf wants a gradient, so no graph of the layers is kept.
    """
    calls: list[_Call] = []
    leaves: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, kwargs))

    def cut(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        leaves.append(_hidden_of(result).detach().requires_grad_())
        return (leaves[0], *result[1:]) if isinstance(result, tuple) else leaves[0]

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(cut))
    try:
        with attention_context(AttentionContext(dense=True)):
            final = model.hidden_states(token_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, leaves[0], final


def _gradient_of_drawn_tokens(model: FidelityModel, last: Tensor, final: Tensor, seed: int) -> Tensor:
    """Gradient of sum_t log p(y_t) with respect to `last`, y_t drawn from p."""
    generator = torch.Generator().manual_seed(seed)
    received = torch.empty_like(final)
    for rows, piece in model.logit_pieces(final.detach()):
        leaf = piece.requires_grad_()
        likelihood = model.logits(leaf).log_softmax(dim=-1)
        # Inverse of the cumulative distribution at numbers from the CPU: the same draws on every device.
        uniform = torch.rand(leaf.shape[0], 1, generator=generator, dtype=torch.float64).to(leaf.device)
        cumulative = likelihood.detach().to(torch.float64).exp().cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp_(max=likelihood.shape[1] - 1)
        (received[rows],) = torch.autograd.grad(likelihood.gather(1, drawn).sum(), leaf)
    (gradient,) = torch.autograd.grad(final, last, received)
    return gradient


def _run_again(model: FidelityModel, layer: nn.Module, call: _Call, gradient: Tensor) -> tuple[LayerCapture, Tensor]:
    """The layer's capture, and the gradient with respect to its input."""
    taken: list[LayerCapture] = []
    hidden = call.hidden.detach().requires_grad_()
    with _observing(model, taken.append):
        result = call.repeat(layer, hidden)
    of_output, of_input = torch.autograd.grad(result, (taken[0].output, hidden), gradient)
    return taken[0].with_gradient(of_output), of_input


@contextmanager
def _observing(model: FidelityModel, observe: _Observer) -> Iterator[None]:
    """Dense attention that shows itself to `observe`."""
    token = _observer.set(observe)
    model.module.set_attn_implementation(NAME)
    try:
        with attention_context(AttentionContext(dense=True)):
            yield
    finally:
        model.module.set_attn_implementation(SALE)
        _observer.reset(token)
