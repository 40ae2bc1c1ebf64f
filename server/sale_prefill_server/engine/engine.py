"""One step of the model: a chunk of a prefill, or one decoded token. Called from the scheduler's thread only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as TokenIds
from dataclasses import replace

import torch

from sale_attention import AttentionStatistics, Audit, LayerPolicy, Profile, SaleConfig, get_backend
from sale_attention.crossover import NEVER, costs_of, crossover_of_heads, longest_dense_prompt
from sale_attention.transformers_integration import AttentionContext, attention_context
from sale_prefill_server.engine.decode import GraphDecoder
from sale_prefill_server.engine.guard import Guard, GuardReport
from sale_prefill_server.engine.model import LoadedModel
from sale_prefill_server.engine.report import ProfileReport
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings, Sequence
from sale_prefill_server.kv.pool import KvPool
from sale_prefill_server.kv.prefix import chain_root

logger = logging.getLogger(__name__)

#: Prefill a little at start, so that a first request meets warm kernels: enough tokens for sparse rows to exist.
_WARM_UP_TOKENS = 1280


class Engine:
    """A loaded model with its KV pool.

    Args:
        model: the model.
        pool: memory for KV.
        defaults: attention of a session that asks for none.
        config: SALE's geometry; `dense_rows` is the least that a session's crossover may be.
        chunk_tokens: prefill chunk, a multiple of 128; boundaries are at its multiples by absolute position.
        attention_backend: name of the backend that runs SALE, or "auto".
        crossover: let each session's rows take dense attention up to where sparse is expected to pay; else up to
            `config.dense_rows`.
        profile: what heads do in sessions with an error budget.
        guard: looks at what some requests lost.
        decode_graphs: decode by CUDA graphs on a CUDA device; a model that cannot is decoded launch by launch.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: KvPool,
        defaults: AttentionSettings,
        config: SaleConfig,
        *,
        chunk_tokens: int,
        attention_backend: str,
        crossover: bool = False,
        profile: Profile | None = None,
        guard: Guard | None = None,
        decode_graphs: bool = True,
    ) -> None:
        self.model = model
        self.pool = pool
        self.defaults = defaults
        self.config = config
        self.chunk_tokens = chunk_tokens
        self.profile = profile
        self.guard = guard
        self._backend_name = attention_backend
        self._backend = get_backend(attention_backend, model.device)
        self._has_crossover = crossover
        self._reads_pages: bool | None = None
        self._graphs = GraphDecoder(model, pool) if decode_graphs and model.device.type == "cuda" else None

    @property
    def attention_backend(self) -> str:
        """What runs SALE on this model's heads, such as "cpu-avx512"."""
        shape = self.model.kv_shape
        return self._backend.runs_on(shape.head_dim, shape.dtype, shape.device)

    @property
    def kernel_fallback(self) -> str | None:
        """Why the torch reference computes where native kernels were wanted: "build", "shape", or None."""
        if self._backend_name == "reference" or self.attention_backend != "reference":
            return None
        return "build" if self._backend.description == "reference" else "shape"

    def open(self, settings: AttentionSettings, tenant: str = "") -> Sequence:
        """An empty sequence; the caller owns it. Where its rows turn sparse is decided here, for its whole life.

        Its KV can be shared with sequences of the same `tenant` alone.
        """
        policies = self._policies(settings)
        if self.guard is not None and self._is_expected(settings):
            policies = self.guard.adjusted(policies)
        config = self.geometry(settings)
        root = self._chain_root(tenant, settings, config, policies)
        return Sequence(self.pool.create(), settings, config, policies, self.level(settings), root)

    def _chain_root(
        self, tenant: str, settings: AttentionSettings, config: SaleConfig, policies: list[LayerPolicy]
    ) -> bytes:
        """Of all that KV depends on beside tokens. Policies count as they are, so a fallback of the guard shows."""
        parts: list[str | bytes] = [tenant, self.model.fingerprint, self.model.rope_fingerprint, settings.mode]
        if settings.mode is not AttentionMode.DENSE:
            parts += [repr(config), self.attention_backend]
            for policy in policies:
                parts += [policy.tau.numpy().tobytes(), policy.query_stride.numpy().tobytes()]
                parts.append(b"" if policy.key_centre is None else policy.key_centre.float().cpu().numpy().tobytes())
        return chain_root(*parts)

    def _is_expected(self, settings: AttentionSettings) -> bool:
        """Whether the server said what heads do, not the caller: then the guard knows what they should lose."""
        return settings.error_budget is not None or settings == self.defaults

    def level(self, settings: AttentionSettings) -> int | None:
        """The profile's level that `settings` get; None for a threshold of their own, or a budget below the least.

        Raises:
            ValueError: an error budget where there is no profile.
        """
        if settings.mode is AttentionMode.DENSE or settings.error_budget is None:
            return None
        if self.profile is None:
            raise ValueError(f"error_budget={settings.error_budget} needs a profile, and this engine has none")
        return self.profile.level_for(settings.error_budget)

    def _policies(self, settings: AttentionSettings) -> list[LayerPolicy]:
        level = self.level(settings)
        if level is not None and self.profile is not None:
            return self.profile.policies(level)
        policy = LayerPolicy.uniform(self.model.num_query_heads, settings.threshold, settings.query_stride)
        return [policy] * self.model.kv_shape.num_layers

    def geometry(self, settings: AttentionSettings) -> SaleConfig:
        """Of a session with `settings`, for its whole life: with the rows and the prompts that run dense.

        A threshold of its own is relative to sink and local keys, as the paper has it, whatever the profile's are.
        """
        if settings.error_budget is not None and self.level(settings) is None:
            return replace(self.config, dense_rows=NEVER)
        config = self.config if settings.error_budget is not None else replace(self.config, sample_stride=0)
        if not self._has_crossover:
            return config
        costs = costs_of(self.attention_backend, self.model.kv_shape.head_dim, self.model.device.type)
        policies = self._policies(settings)
        heads = [
            head for policy in policies for head in zip(policy.tau.tolist(), policy.query_stride.tolist(), strict=True)
        ]
        rows = crossover_of_heads(costs, heads, config)
        layers = sum(not all(policy.dense_heads) for policy in policies)
        prompt = longest_dense_prompt(costs, heads, layers, rows)
        return replace(config, dense_rows=rows, dense_prompt_tokens=prompt)

    def profile_report(self, sequence: Sequence) -> ProfileReport | None:
        """What the sequence got from the profile; None where it asked for none."""
        budget = sequence.settings.error_budget
        if self.profile is None or budget is None or sequence.settings.mode is AttentionMode.DENSE:
            return None
        heads = self.model.num_query_heads * self.model.kv_shape.num_layers
        if sequence.level is None:
            return ProfileReport(self.profile.name, self.profile.digest, 0.0, 0.0, 0, 0, heads)
        level = self.profile.levels[sequence.level]
        taus = torch.cat([policy.tau for policy in sequence.policies])
        dense, streaming = int((taus == 0).sum()), int(taus.isinf().sum())
        return ProfileReport(
            self.profile.name,
            self.profile.digest,
            level.error_budget,
            level.mean_error,
            heads - dense - streaming,
            streaming,
            dense,
        )

    def begin_audit(self, sequence: Sequence, start: int, end: int) -> Audit | None:
        """The guard's part in a request that prefills positions `[start, end)`; None for most."""
        settings = sequence.settings
        if self.guard is None or settings.mode is AttentionMode.DENSE or not self._is_expected(settings):
            return None
        if end <= sequence.config.dense_prompt_tokens:
            return None
        start = max(start, sequence.config.dense_rows)
        return self.guard.begin(sequence.policies, sequence.config.query_block, start, end)

    def finish_audit(self, sequence: Sequence, audit: Audit) -> GuardReport | None:
        """What the guard makes of it; waits for the device. None, too, where that has no memory for it."""
        if self.guard is None:
            return None
        try:
            return self.guard.finish(audit, sequence.level)
        except torch.OutOfMemoryError as error:
            logger.warning("what the guard looked at stays unjudged: %s", error)
            return None

    def next_boundary(self, position: int, end: int) -> int:
        """Where the chunk that starts at `position` ends."""
        return min((position // self.chunk_tokens + 1) * self.chunk_tokens, end)

    def new_statistics(self) -> AttentionStatistics:
        """An empty record of what attention did."""
        return AttentionStatistics()

    @torch.inference_mode()
    def prefill_chunk(
        self,
        sequence: Sequence,
        token_ids: TokenIds[int],
        *,
        prompt_end: int,
        statistics: AttentionStatistics,
        on_layer: Callable[[int], None] | None = None,
        audit: Audit | None = None,
    ) -> torch.Tensor:
        """Appends `token_ids` to the sequence.

        Args:
            sequence: where to; room must have been reserved.
            token_ids: one chunk.
            prompt_end: position one past the last token of the whole request.
            statistics: what attention did is added here.
            on_layer: called after each layer's attention with its index; may raise to stop.
            audit: from `begin_audit`.

        Returns:
            Logits [vocabulary_size] float32 of the last position, on the CPU.
        """
        context = AttentionContext(
            config=sequence.config,
            policies=sequence.policies,
            states=sequence.states,
            dense=sequence.settings.mode is AttentionMode.DENSE or sequence.config.dense_rows >= NEVER,
            prompt_end=prompt_end,
            statistics=statistics,
            on_layer=on_layer,
            backend=self._backend_name,
            audit=audit,
        )
        return self._forward(sequence, token_ids, context)

    @torch.inference_mode()
    def decode_token(self, sequence: Sequence, token_id: int) -> torch.Tensor:
        """Appends one token with dense attention; returns logits as `prefill_chunk` does."""
        logits = None if self._graphs is None else self._graphs.decode(sequence, token_id)
        if logits is not None:
            return logits
        return self._forward(sequence, [token_id], AttentionContext(config=sequence.config, dense=True))

    def _forward(self, sequence: Sequence, token_ids: TokenIds[int], context: AttentionContext) -> torch.Tensor:
        input_ids = torch.tensor([list(token_ids)], dtype=torch.int64, device=self.model.device)
        sequence.cache.gather(not self._reads_pages)
        layers: set[int] = set()
        if self._reads_pages is None:
            context = replace(context, on_layer=_noting(layers, context.on_layer))
        elif self._reads_pages:
            tokens = sequence.num_tokens + len(token_ids)
            context = replace(context, page_table=sequence.kv.page_table, tokens=tokens)
        with attention_context(context):
            output = self.model.module(
                input_ids=input_ids, past_key_values=sequence.cache, use_cache=True, logits_to_keep=1
            )
        if self._reads_pages is None:
            self._reads_pages = len(layers) == self.model.kv_shape.num_layers
            if not self._reads_pages:
                logger.warning("the model has attention of its own: it is dense, and KV is copied for it in every step")
        logits: torch.Tensor = output.logits[0, -1]
        return logits.float().cpu()

    def warm_up(self) -> float:
        """Runs one short prefill and a decode step (or two, for a graph), building what is built just in time.

        Returns seconds.
        """
        started = time.perf_counter()
        decoded = 1 if self._graphs is None else 2
        count = min(_WARM_UP_TOKENS, self.model.max_sequence_tokens - decoded)
        sequence = self.open(self.defaults)
        try:
            sequence.kv.reserve(count + decoded)
            sequence.config = self.config  # sparse rows as early as they may be, so that every kernel runs once
            tokens = [position % self.model.vocabulary_size for position in range(count)]
            self.prefill_chunk(sequence, tokens, prompt_end=count, statistics=self.new_statistics())
            for _ in range(decoded):
                self.decode_token(sequence, 0)
        finally:
            sequence.release()
        return time.perf_counter() - started


def _noting(layers: set[int], on_layer: Callable[[int], None] | None) -> Callable[[int], None]:
    def note(layer: int) -> None:
        layers.add(layer)
        if on_layer is not None:
            on_layer(layer)

    return note
