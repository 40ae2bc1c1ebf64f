"""Choosing the next token through transformers' own logits processors."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sale_prefill_server.errors import PrefillError, Reason


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy; the other defaults switch a step off.

    `seed` None draws a fresh one, which the sampler reports.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 (greedy) to 100")
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _require("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1")
        _require(
            "repetition_penalty",
            self.repetition_penalty,
            0.0 < self.repetition_penalty <= 100.0,
            "above 0, at most 100",
        )


def _require(name: str, value: float, fine: bool, allowed: str) -> None:
    if not fine or math.isnan(value):
        raise PrefillError(
            Reason.INVALID_SAMPLING,
            f"sampling.{name} = {value}: must be {allowed}",
            metadata={name: value},
            field=f"sampling.{name}",
        )


@dataclass(frozen=True)
class SampledToken:
    """A token with its log-probability at temperature 1, before any processor, and the best alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float, float], ...] = ()


class Sampler:
    """Draws one sequence's tokens. The same seed, settings and logits give the same tokens.

    Args:
        sampling: settings.
        num_top: alternatives to report with each token.
    """

    def __init__(self, sampling: Sampling, num_top: int = 0) -> None:
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._greedy = sampling.temperature == 0.0
        self._num_top = num_top
        self._generator = torch.Generator().manual_seed(self.seed)
        self._needs_history = sampling.repetition_penalty != 1.0
        self._processors = LogitsProcessorList()
        if self._needs_history:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if self._greedy:
            return
        if sampling.temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self._processors.append(MinPLogitsWarper(sampling.min_p))

    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> SampledToken:
        """Chooses from `logits` [vocabulary_size] float32, given the session's token ids so far."""
        input_ids = torch.tensor([list(history)], dtype=torch.int64) if self._needs_history else torch.empty(1, 0)
        scores = self._processors(input_ids, logits[None].clone())[0]
        if self._greedy:
            token_id = int(scores.argmax())
        else:
            token_id = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        logprobs = logits.log_softmax(-1)
        return SampledToken(token_id, float(logprobs[token_id]), best_logits(logits, self._num_top, logprobs))


def best_logits(
    logits: torch.Tensor, count: int, logprobs: torch.Tensor | None = None
) -> tuple[tuple[int, float, float], ...]:
    """The `count` best of `logits` [vocabulary_size] as (token id, logit, natural log-probability), best first."""
    if count == 0:
        return ()
    values, indices = logits.topk(min(count, logits.shape[0]))
    chosen = (logits.log_softmax(-1) if logprobs is None else logprobs)[indices]
    return tuple(zip(indices.tolist(), values.tolist(), chosen.tolist(), strict=True))
