"""Answer log-likelihoods: one prefill an item, then all of its candidates in one pass behind the shared KV."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sale_attention.transformers_integration import AttentionContext, attention_context

from ..models import FidelityModel
from .tasks import Item


@dataclass(frozen=True)
class EncodedItem:
    """An item as token ids.

    Attributes:
        item: what was encoded.
        prompt_ids: chat template, prompt, and the lead of the answer.
        candidate_ids: one or more each.
        digest: of all ids: two machines that agree on it asked the same question.
    """

    item: Item
    prompt_ids: tuple[int, ...]
    candidate_ids: tuple[tuple[int, ...], ...]
    digest: str


def encode_item(model: FidelityModel, item: Item) -> EncodedItem:
    """The token ids of `item`, in the model's chat template where it has one.

    Raises:
        ValueError: the prompt with its longest candidate is longer than the model's context.
    """
    prompt_ids = model.encode(_conversation(model.tokenizer, item.prompt) + item.lead)
    candidates = [_continuation(model, item.lead, candidate) for candidate in item.candidates]
    total = len(prompt_ids) + max(map(len, candidates))
    if total > model.max_tokens:
        raise ValueError(
            f"an item of {item.task!r} has {total} tokens with this chat template, and {model.name!r} takes "
            f"{model.max_tokens}; evaluate shorter ones (--lengths)"
        )
    digest = hashlib.sha256(repr([prompt_ids, candidates]).encode()).hexdigest()[:16]
    return EncodedItem(item, tuple(prompt_ids), tuple(map(tuple, candidates)), digest)


@torch.inference_mode()
def candidate_scores(model: FidelityModel, encoded: EncodedItem, context: AttentionContext) -> Tensor:
    """Log-likelihood of every candidate, float32 `[candidates]`, on the model's device.

    The prompt runs in one piece under `context`; what follows is decoded text, which is dense. All candidates go
    through the model side by side in one sequence: each sees the prompt and itself, at the positions it would have.
    """
    cache = DynamicCache()
    prompt = torch.tensor([encoded.prompt_ids], device=model.device)
    with attention_context(context):
        output = model.module(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    first = output.logits[0, -1].float().log_softmax(-1)
    candidates = encoded.candidate_ids
    starts = torch.tensor([candidate[0] for candidate in candidates], device=model.device)
    scores: Tensor = first[starts]
    rows = _Rows.of(candidates)
    if rows.inputs:
        scores = scores.index_add(0, *_continued(model, rows, cache, len(encoded.prompt_ids)))
    return scores


def margin(scores: Sequence[float], num_right: int) -> float:
    """How much likelier the least likely right candidate is than the likeliest wrong one, in nats."""
    return min(scores[:num_right]) - max(scores[num_right:])


@dataclass(frozen=True)
class _Rows:
    """Candidates' tokens but for their last, in one sequence: what goes in, what should come out, whose, and where."""

    inputs: list[int]
    targets: list[int]
    owners: list[int]
    offsets: list[int]

    @classmethod
    def of(cls, candidates: Sequence[Sequence[int]]) -> _Rows:
        steps = [
            (token, target, owner, offset)
            for owner, candidate in enumerate(candidates)
            for offset, (token, target) in enumerate(itertools.pairwise(candidate))
        ]
        return cls(*(list(column) for column in zip(*steps, strict=True))) if steps else cls([], [], [], [])


def _continued(model: FidelityModel, rows: _Rows, cache: DynamicCache, prompt_tokens: int) -> tuple[Tensor, Tensor]:
    """Owner and log-likelihood of every row's next token."""
    columns = torch.tensor([rows.inputs, rows.targets, rows.owners, rows.offsets], device=model.device)
    inputs, targets, owners, offsets = columns
    own = (owners[:, None] == owners) & (offsets[:, None] >= offsets)
    prompt = own.new_ones(len(rows.inputs), prompt_tokens)
    output: Any = model.module(
        input_ids=inputs[None],
        position_ids=prompt_tokens + offsets[None],
        attention_mask=torch.cat([prompt, own], dim=1)[None, None],
        past_key_values=cache,
        use_cache=True,
    )
    likelihoods = output.logits[0].float().log_softmax(-1)
    return owners, likelihoods.gather(1, targets[:, None]).squeeze(1)


def _conversation(tokenizer: Any, prompt: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return f"{prompt}\n"
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _continuation(model: FidelityModel, lead: str, candidate: str) -> list[int]:
    """The candidate's tokens as they stand behind the lead; by themselves where the two merge at the seam."""
    before, both = model.encode(lead), model.encode(lead + candidate)
    return both[len(before) :] if both[: len(before)] == before else model.encode(candidate)
