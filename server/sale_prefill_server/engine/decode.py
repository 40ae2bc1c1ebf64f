"""Decode on CUDA: one step of the model as a graph, captured once and replayed for every token of every sequence.

A step launched operation by operation keeps the host busy for longer than the GPU. Here everything that changes from
step to step lies in device memory (`StaticStep`): the token, its position, and the page table of the sequence. So one
recording of the launches serves them all.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from transformers.cache_utils import Cache

from sale_attention import DecodeStep, has_decode_kernel
from sale_attention.transformers_integration import AttentionContext, attention_context
from sale_prefill_server.engine.cache import StepCacheLayer
from sale_prefill_server.engine.model import LoadedModel
from sale_prefill_server.engine.sequence import Sequence
from sale_prefill_server.kv.pool import PAGE_TOKENS, KvPool, SessionKv

logger = logging.getLogger(__name__)


class StaticStep:
    """The model's decode step with its inputs, and where its token goes, in memory that stays in place."""

    def __init__(self, model: LoadedModel, pool: KvPool) -> None:
        self._model = model
        self._pool = pool
        self._capacity = -(-model.max_sequence_tokens // PAGE_TOKENS) * PAGE_TOKENS
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=model.device)
        # Entries behind a sequence's last page are never used; page 0 is there to be named.
        self._table = torch.zeros((1, self._capacity // PAGE_TOKENS), dtype=torch.int64, device=model.device)

    def set(self, token_id: int, kv: SessionKv) -> None:
        """What the next run decodes, at the end of which sequence; its pages must have room for one more token."""
        self._token.fill_(token_id)
        self._position.fill_(kv.num_tokens)
        table = kv.page_table
        self._table[:, : table.shape[1]].copy_(table)

    def run(self) -> torch.Tensor:
        """One step over what was `set`; the sequence's length is left to the caller.

        Returns:
            Logits [vocabulary_size] float32, on the device.

        Raises:
            ValueError: a layer needs more than lengths on the device: a mask, a sliding window.
            RuntimeError: a layer did its attention elsewhere, so that the result would be wrong.
        """
        pool, layers = self._pool, list[int]()
        page = self._table.gather(1, (self._position // PAGE_TOKENS).unsqueeze(0)).squeeze(0)
        slots = page * PAGE_TOKENS + self._position % PAGE_TOKENS
        cache = Cache(
            layers=[
                StepCacheLayer(keys, values, slots, self._capacity)
                for keys, values in zip(pool.keys, pool.values, strict=True)
            ]
        )
        step = DecodeStep(self._position + 1, self._table)
        with attention_context(AttentionContext(dense=True, decode=step, on_layer=layers.append)):
            output = self._model.module(
                input_ids=self._token,
                position_ids=self._position.unsqueeze(0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if layers != list(range(pool.shape.num_layers)):
            raise RuntimeError(f"layers {layers} of {pool.shape.num_layers} came through this package's attention")
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits


class GraphDecoder:
    """Decodes by one graph as far as the model allows.

    The first step runs launch by launch, the second is captured. Either way the same kernels run, so that logits do not
    depend on which step was captured.
    """

    def __init__(self, model: LoadedModel, pool: KvPool) -> None:
        self._step = StaticStep(model, pool)
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        shape = model.kv_shape
        self.enabled = has_decode_kernel(shape.device, shape.dtype, shape.head_dim)
        if not self.enabled:
            logger.warning(
                "decode runs without CUDA graphs: no kernel for %s at head_dim %d on %s",
                shape.dtype,
                shape.head_dim,
                shape.device,
            )

    @property
    def captured(self) -> bool:
        """Whether tokens are decoded by the graph from now on."""
        return self._graph is not None

    def decode(self, sequence: Sequence, token_id: int) -> torch.Tensor | None:
        """Appends one token. Returns its logits on the CPU; None where it cannot, and then nothing has changed.

        Raises:
            ValueError: past what was reserved.
        """
        if not self.enabled:
            return None
        sequence.kv.require_room(1)
        sequence.kv.require_loaded()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                self._step.set(token_id, sequence.kv)
                logits = self._run().cpu()
        except torch.cuda.OutOfMemoryError as error:
            self._abandon()
            torch.cuda.empty_cache()  # what the allocator holds back it cannot give to a capture
            logger.warning("a token is decoded without a CUDA graph: %s", error)
            return None
        except Exception as error:  # whatever a model's code raises while its launches are recorded
            self._abandon()
            self.enabled = False
            self._graph = None
            logger.warning("decode runs without CUDA graphs: %s: %s", type(error).__name__, error)
            return None
        sequence.kv.extend_to(sequence.num_tokens + 1)
        return logits

    def _run(self) -> torch.Tensor:
        if self._logits is None:
            logits = self._step.run()
            self._logits = logits.clone()
            return logits
        if self._graph is None:
            self._graph = self._capture(self._logits)
        self._graph.replay()
        return self._logits

    def _abandon(self) -> None:
        """What was launched before an error may still write where the next step will."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _capture(self, logits: torch.Tensor) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy KV meanwhile: only this one must do nothing that cannot be recorded.
        with _no_garbage_collection():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits.copy_(self._step.run())
            except BaseException:
                with suppress(RuntimeError):  # the error that is under way says more
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collected CUDA object could free memory, which would spoil a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
