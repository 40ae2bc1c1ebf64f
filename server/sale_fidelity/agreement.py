"""How far next-token distributions move: SALE against dense attention on the same model and prompt.

Measured best with a float32 model. In bfloat16 two exact dense kernels that sum in different orders already agree on
only 97.5 to 98.3 % of the default model's next tokens (KL 0.001), because 4 % of its bfloat16 logits tie for the first
place and any last bit spreads through thirty layers; in float32 what differs is what SALE dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sale_attention import AttentionStatistics, LayerPolicy, SaleConfig
from sale_attention.backends import AUTO
from sale_attention.transformers_integration import AttentionContext, attention_context

from . import masked
from .models import FidelityModel

#: Positions from which agreement is reported, as a rule: shorter prompts have little to drop.
FIRST_POSITION = 2048


@dataclass(frozen=True, eq=False)
class Reference:
    """Dense attention's result on one prompt, kept to be compared with many settings.

    Attributes:
        token_ids: the prompt.
        first: position from which predictions are compared.
        hidden: last hidden states of positions `first .. len(token_ids) - 2`, whose next token is known; logits are
            made from them in pieces, since logits of 8K positions are gigabytes.
    """

    token_ids: tuple[int, ...]
    first: int
    hidden: Tensor


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predictions of one or more prompts against dense ones, a row a position; all on the CPU.

    Attributes:
        position: int64 `[rows]`.
        agrees: bool `[rows]`, the same most likely next token.
        kl: float32 `[rows]`, KL(dense || SALE) of the next token in nats.
        nll: float32 `[rows]`, of the true next token in nats.
        dense_nll: float32 `[rows]`, the same by dense attention.
        density: share of causal blocks that were computed, over whole prompts.
    """

    position: Tensor
    agrees: Tensor
    kl: Tensor
    nll: Tensor
    dense_nll: Tensor
    density: float

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely next token."""
        return float(self.agrees.to(torch.float64).mean())

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return float(self.kl.to(torch.float64).mean())

    @property
    def perplexity(self) -> float:
        """Of the true next tokens."""
        return math.exp(float(self.nll.to(torch.float64).mean()))

    @property
    def dense_perplexity(self) -> float:
        """Of the true next tokens, by dense attention."""
        return math.exp(float(self.dense_nll.to(torch.float64).mean()))

    @property
    def perplexity_change(self) -> float:
        """Perplexity relative to dense, less 1."""
        return self.perplexity / self.dense_perplexity - 1.0

    def between(self, start: int, end: int) -> Agreement:
        """The rows of positions `[start, end)`; `density` stays that of whole prompts."""
        rows = (self.position >= start) & (self.position < end)
        columns = (self.position, self.agrees, self.kl, self.nll, self.dense_nll)
        position, agrees, kl, nll, dense_nll = (column[rows] for column in columns)
        return Agreement(position, agrees, kl, nll, dense_nll, self.density)


def dense_reference(
    model: FidelityModel, token_ids: Sequence[int], first: int = FIRST_POSITION, backend: str = AUTO
) -> Reference:
    """Runs one prompt dense.

    Args:
        model: in float32 as a rule; see above.
        token_ids: the prompt, longer than `first + 1` tokens.
        first: position from which to compare.
        backend: whose dense attention; take the same for `compare`.

    Raises:
        ValueError: the prompt is too short.
    """
    if len(token_ids) < first + 2:
        raise ValueError(f"{len(token_ids)} tokens: nothing to compare from position {first} on")
    with torch.inference_mode(), attention_context(AttentionContext(dense=True, backend=backend)):
        hidden = model.hidden_states(token_ids)[first:-1].clone()
    return Reference(tuple(token_ids), first, hidden)


@torch.inference_mode()
def compare(
    model: FidelityModel,
    reference: Reference,
    policies: Sequence[LayerPolicy],
    config: SaleConfig | None = None,
    backend: str = AUTO,
) -> Agreement:
    """Runs the prompt of `reference` with SALE and compares every prediction.

    Args:
        model: the one that made `reference`.
        reference: dense predictions.
        policies: one a layer.
        config: block geometry; default `SaleConfig()`.
        backend: attention backend; `masked.NAME` is quickest for float32 on a GPU.
    """
    statistics = AttentionStatistics()
    context = AttentionContext(config=config or SaleConfig(), policies=policies, statistics=statistics, backend=backend)
    with attention_context(context):
        hidden = model.hidden_states(reference.token_ids)[reference.first : -1]
    targets = torch.tensor(reference.token_ids[reference.first + 1 :], device=model.device)
    pieces = [
        _compared(model.logits(reference.hidden[rows]), model.logits(piece), targets[rows])
        for rows, piece in model.logit_pieces(hidden)
    ]
    agrees, kl, nll, dense_nll = (torch.cat(column).cpu() for column in zip(*pieces, strict=True))
    position = torch.arange(reference.first, reference.first + len(targets))
    return Agreement(position, agrees, kl, nll, dense_nll, statistics.density)


def pooled(parts: Sequence[Agreement]) -> Agreement:
    """Several prompts as one; densities are averaged."""
    columns = zip(*((part.position, part.agrees, part.kl, part.nll, part.dense_nll) for part in parts), strict=True)
    position, agrees, kl, nll, dense_nll = (torch.cat(column) for column in columns)
    return Agreement(position, agrees, kl, nll, dense_nll, sum(part.density for part in parts) / len(parts))


def quickest_backend(model: FidelityModel) -> str:
    """The backend to measure `model` with.

    The CPU's own kernels; on a GPU "masked", because kernels there take neither float32 nor every block geometry.
    """
    return AUTO if model.device.type == "cpu" else masked.NAME


def _compared(dense: Tensor, sparse: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expected, found = dense.log_softmax(dim=-1), sparse.log_softmax(dim=-1)
    kl = (expected.exp() * (expected - found)).sum(dim=-1).clamp_(min=0.0)
    chosen = targets.unsqueeze(1)
    nll, dense_nll = (-source.gather(1, chosen).squeeze(1) for source in (found, expected))
    return dense.argmax(dim=-1) == sparse.argmax(dim=-1), kl, nll, dense_nll
