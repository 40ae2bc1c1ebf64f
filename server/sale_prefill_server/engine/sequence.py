"""One session's compute state: its KV, the cache the model writes to, and what attention keeps between chunks."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from sale_attention import LayerPolicy, LayerState, SaleConfig
from sale_prefill_server.engine.cache import SessionCache
from sale_prefill_server.kv.pool import PAGE_TOKENS, SessionKv
from sale_prefill_server.kv.prefix import PrefixChain, page_keys


class AttentionMode(StrEnum):
    """Attention method of prefill."""

    SALE = "sale"
    DENSE = "dense"


@dataclass(frozen=True)
class AttentionSettings:
    """Attention of one session, fixed for its life so that chunks and appends cannot change a result.

    For SALE: with an `error_budget` what the profile says, else `threshold` (tau) and `query_stride` (1, 2 or 4) for
    all heads.
    """

    mode: AttentionMode
    threshold: float
    query_stride: int
    error_budget: float | None = None

    def __str__(self) -> str:
        """For messages: the mode and what matters to it."""
        if self.mode is AttentionMode.DENSE:
            return "dense attention"
        if self.error_budget is not None:
            return f"sale attention, error_budget {self.error_budget:g}"
        return f"sale attention, threshold {self.threshold:g}, query_stride {self.query_stride}"


class _LayerCodes:
    """Key codes of one layer, in the pages of a sequence's KV."""

    def __init__(self, kv: SessionKv, layer: int) -> None:
        self._kv = kv
        self.codes = kv.pool.codes[layer]
        self.scales = kv.pool.scales[layer]

    @property
    def page_table(self) -> Tensor:
        """int64 `[1, pages]`."""
        return self._kv.page_table


class Sequence:
    """Owned by its session; used by one engine step at a time.

    `config` and `policies` (one a layer) are fixed for its life, so that chunks and appends cannot change a result;
    `level` is the profile's level that they come from, None for a threshold of the caller's, or where all is dense.
    `states` (one a layer) can be recomputed from the KV and never travel. `chain` names its whole pages; its root holds
    all that KV depends on beside tokens, so that sequences with equal keys have equal KV.
    """

    def __init__(
        self,
        kv: SessionKv,
        settings: AttentionSettings,
        config: SaleConfig,
        policies: list[LayerPolicy],
        level: int | None = None,
        root: bytes = b"",
    ) -> None:
        self.kv = kv
        self.settings = settings
        self.config = config
        self.policies = policies
        self.level = level
        self.chain = PrefixChain(root, PAGE_TOKENS)
        self.states = [LayerState(_LayerCodes(kv, layer)) for layer in range(kv.shape.num_layers)]
        self.cache = SessionCache(kv)

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is complete."""
        return self.kv.num_tokens

    @property
    def _least_shared_tokens(self) -> int:
        """Sequences that share fewer tokens share no pages: the centre of their key codes would not be the same."""
        if self.settings.mode is AttentionMode.DENSE or all(policy.key_centre is not None for policy in self.policies):
            return 0
        return self.config.centre_tokens

    def truncate(self, num_tokens: int) -> None:
        """Forgets everything from `num_tokens` on, half-written layers included; `reserve` before the next append."""
        self.kv.truncate(num_tokens, rewritten_from=0 if num_tokens < self._least_shared_tokens else None)
        self.chain.truncate(num_tokens)
        for state in self.states:
            state.truncate(num_tokens)

    def offer(self, token_ids: TokenIds[int]) -> None:
        """Lets other sequences find the whole pages of this one, which holds `token_ids` now.

        Not while KV is being brought back: the next offer will.
        """
        first = len(self.chain.keys)
        if len(token_ids) // PAGE_TOKENS == first or self.kv.is_loading:
            return
        self.chain.extend(token_ids)
        self.kv.name_pages(self.chain.keys[first:], first)
        self.kv.mark_coded(min(state.tokens for state in self.states))

    def adopt(self, token_ids: TokenIds[int], *, copies: bool, whole: bool = False) -> int:
        """Takes KV from other sequences for the beginning of `token_ids`, all that this one is to hold.

        Args:
            token_ids: from its first token on.
            copies: also where pages cannot be shared; without it this is quick.
            whole: for the last token, too, whose logits are known.

        Returns:
            Tokens gained.

        Raises:
            KvCapacityError: what is found must be copied, and there is no room.
        """
        before = self.num_tokens
        keys = list(page_keys(self.chain.root, token_ids if whole else token_ids[: len(token_ids) - 1], PAGE_TOKENS))
        tokens = self.kv.adopt(keys, least_shared_tokens=self._least_shared_tokens, copies=copies)
        if not tokens:
            return 0
        self.chain.extend(token_ids[:tokens])
        for state in self.states:
            state.clear()
            state.adopt(self.kv.coded_tokens, self.config)
        return tokens - before

    def emptied(self) -> Sequence:
        """A sequence of the same kind that holds nothing."""
        return Sequence(self.kv.pool.create(), self.settings, self.config, self.policies, self.level, self.chain.root)

    def fork(self, num_tokens: int) -> Sequence:
        """A sequence of its first `num_tokens` tokens, 1 or more, which shares their pages.

        Raises:
            KvCapacityError: no page is left.
        """
        shared = num_tokens >= self._least_shared_tokens
        kv = self.kv.fork(num_tokens, shared=shared)
        child = Sequence(kv, self.settings, self.config, self.policies, self.level, self.chain.root)
        child.chain.keys = self.chain.keys[: num_tokens // PAGE_TOKENS]
        if shared:
            child.states = [state.fork(_LayerCodes(kv, index), num_tokens) for index, state in enumerate(self.states)]
        return child

    def release(self, *, keep: bool = False) -> None:
        """Gives the pages back once the last reader is done; with `keep`, others may still find them."""
        self.states.clear()
        self.kv.release(keep=keep)
