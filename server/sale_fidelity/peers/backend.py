"""Attention backend "peers": whole prompts through a model, with any method's mask in place of SALE's.

`sale_fidelity.agreement.compare` and whatever else names an attention backend can so measure a peer on a model:

    with using(EachHead(method, density=0.2)) as chooser:
        agreement = compare(model, reference, policies, backend=backend.NAME)

Policies are not looked at. For measuring only: scores are computed in full and masked, in the precision of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sale_attention import LayerCall, register_backend
from sale_attention.dense import dense_attention
from sale_attention.reference import ReferenceBackend

from .errors import BlockSample, ErrorSummary, sampled_blocks
from .methods import Method
from .rule import QUERY_BLOCK, DensityCurve, Head, Levels, solve_shared

NAME = "peers"

# Query blocks by which a method's setting is searched for a head, as its paper does offline.
_SEARCH_BLOCKS = 8
_ROW_PIECE = 1024
_CURVE_POINTS = 2048


class Chooser(Protocol):
    """Decides on one head after the other, in the order in which a model computes them."""

    def choose(self, head: Head, values: Tensor) -> tuple[Levels, float] | None:
        """What `head` attends to, as levels and a knob; None for everything. `values` are float32 `[N, d_v]`."""


class EachHead:
    """Every head at the same density, its knob its own.

    Attributes:
        densities: reached, by layer and head in one list.
    """

    def __init__(self, method: Method, density: float) -> None:
        self.densities: list[float] = []
        self._method, self._density = method, density

    def choose(self, head: Head, values: Tensor) -> tuple[Levels, float]:
        """See `Chooser`."""
        _, levels = best_setting(self._method, head, values, self._density)
        knob = levels.solve(self._density)
        self.densities.append(levels.density(knob))
        return levels, knob


class Survey:
    """Leaves attention dense, and notes each head's best setting and its density at every knob."""

    def __init__(self, method: Method, density: float) -> None:
        self._method, self._density = method, density
        self._places: list[int] = []
        self._curves: list[DensityCurve] = []

    def choose(self, head: Head, values: Tensor) -> None:
        """See `Chooser`."""
        place, levels = best_setting(self._method, head, values, self._density)
        self._places.append(place)
        self._curves.append(levels.curve.thinned(_CURVE_POINTS))

    def one_knob(self) -> OneKnob:
        """The knob that gives all heads that were seen the density asked for in the mean."""
        return OneKnob(self._method, solve_shared(self._curves, self._density), self._places)


class OneKnob:
    """All heads at one knob, as a method is used; each head in a setting of its own.

    Attributes:
        densities: reached, by layer and head in one list.
    """

    def __init__(self, method: Method, knob: float, places: list[int]) -> None:
        self.densities: list[float] = []
        self._method, self._knob, self._places = method, knob, places

    def choose(self, head: Head, values: Tensor) -> tuple[Levels, float]:
        """See `Chooser`; a second prompt starts at the first head again."""
        place = self._places[len(self.densities) % len(self._places)]
        levels = self._method.rules[place].levels(head)
        self.densities.append(levels.density(self._knob))
        return levels, self._knob


def best_setting(method: Method, head: Head, values: Tensor, density: float) -> tuple[int, Levels]:
    """The setting with the least p99 row error on a few query blocks, among those nearest to `density`."""
    levels = [rule.levels(head) for rule in method.rules]
    if len(levels) == 1:
        return 0, levels[0]
    samples = [BlockSample.of(head, values, i) for i in sampled_blocks(levels[0].query_blocks, _SEARCH_BLOCKS)]
    knobs = [one.solve(density) for one in levels]
    misses = [abs(one.density(knob) - density) for one, knob in zip(levels, knobs, strict=True)]
    errors = [
        ErrorSummary.of(torch.cat([sample.row_errors(one, knob) for sample in samples])).p99
        for one, knob in zip(levels, knobs, strict=True)
    ]
    nearest = min(misses)
    best = min((place for place, miss in enumerate(misses) if miss <= max(0.01, nearest)), key=errors.__getitem__)
    return best, levels[best]


_current: ContextVar[Chooser] = ContextVar("peers_chooser")


@contextmanager
def using(chooser: Chooser) -> Iterator[None]:
    """Lets the backend ask `chooser` inside the block."""
    token = _current.set(chooser)
    try:
        yield
    finally:
        _current.reset(token)


class PeersBackend(ReferenceBackend):
    """Rows from `SaleConfig.dense_rows` on under masks of the current chooser; earlier ones dense."""

    name = NAME

    def attend_layer(self, call: LayerCall) -> None:
        """Asks the chooser head by head; rules look at the queries of the whole prompt.

        Neither log-sum-exp nor kept blocks are told: nothing that measures wants the one, choosers tell the density.
        """
        query, until, scale = call.query, call.dense_until, call.scale
        if call.kv.tokens != query.shape[2] or not until or any(call.plan.dense):
            raise ValueError(
                f"the {NAME} backend measures whole prompts with dense_rows > 0 and no dense head, not "
                f"{query.shape[2]} rows of {call.kv.tokens} tokens"
            )
        kv = call.kv.gathered()
        call.output[:, :, :until] = dense_attention(query[:, :, :until], kv.prefix(until), scale=scale)
        keys, values = kv.keys_between(0, kv.tokens), kv.values_between(0, kv.tokens)
        group = query.shape[1] // kv.kv_heads
        for row in range(query.shape[0]):
            for index in range(query.shape[1]):
                one_keys, one_values = keys[row, index // group], values[row, index // group]
                head = Head(query[row, index], one_keys, scale, until)
                chosen = _current.get().choose(head, one_values.to(torch.float32))
                _attend(head, one_values, chosen, call.output[row, index])


def _attend(head: Head, values: Tensor, chosen: tuple[Levels, float] | None, output: Tensor) -> None:
    """Fill rows from `head.first_row` on of `output [N, d_v]`."""
    positions = torch.arange(head.tokens, device=values.device)
    for start in range(head.first_row, head.tokens, _ROW_PIECE):
        end = min(start + _ROW_PIECE, head.tokens)
        mask = positions[:end] <= positions[start:end].unsqueeze(1)
        if chosen is not None:
            levels, knob = chosen
            first = (start - head.first_row) // QUERY_BLOCK
            kept = levels.kept(knob)[first : first + _ROW_PIECE // QUERY_BLOCK]
            kept = kept.repeat_interleave(levels.key_block, dim=1)[:, :end]
            mask &= kept.repeat_interleave(QUERY_BLOCK, dim=0)[: end - start]
        piece = scaled_dot_product_attention(
            head.query[None, start:end], head.keys[None, :end], values[None, :end], attn_mask=mask, scale=head.scale
        )
        output[start:end] = piece[0]


register_backend(PeersBackend())
