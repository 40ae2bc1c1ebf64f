"""Decode on CUDA: one step of the model as a graph, captured once a sequence and replayed for every further token.

A step launched operation by operation keeps the host busy for longer than the GPU. Here everything that changes from
step to step lies in device memory (`StaticStep`), so that one recording of the launches serves them all.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sale_attention import DecodeStep, has_decode_kernel
from sale_attention.transformers_integration import AttentionContext, attention_context
from sale_prefill_server.engine.model import LoadedModel
from sale_prefill_server.engine.sequence import Sequence
from sale_prefill_server.kv.pool import SessionKv

logger = logging.getLogger(__name__)

#: A graph of a large model takes a few MB beside the memory that all share.
_MOST_GRAPHS = 32


class StepCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer's buffers: `update` writes one token where the device says, and returns all of the capacity."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__()
        self._keys = keys
        self._values = values
        self._position = position
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory belongs to the pool."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [1, num_kv_heads, 1, head_dim]; returns K and V [1, num_kv_heads, capacity, head_dim]."""
        self._keys.index_copy_(2, self._position, key_states)
        self._values.index_copy_(2, self._position, value_states)
        return self._keys, self._values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if the new token were the last that fits, so that no mask is built."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """See `get_mask_sizes`; the true length is on the device."""
        return self._keys.shape[2] - 1

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit of its own (the name of `get_max_length` before transformers 5.20)."""
        return -1


class StaticStep:
    """The model's decode step with its inputs, and where its token goes, in memory that stays in place."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=model.device)

    def set(self, token_id: int, position: int) -> None:
        """What the next run decodes, and which token of its sequence that is."""
        self._token.fill_(token_id)
        self._position.fill_(position)

    def run(self, kv: SessionKv) -> torch.Tensor:
        """One step over `kv`, whose room must have been made; its lengths are left to the caller.

        Returns:
            Logits [vocabulary_size] float32, on the device.

        Raises:
            ValueError: a layer needs more than lengths on the device: a mask, a sliding window.
            RuntimeError: a layer did its attention elsewhere, so that the result would be wrong.
        """
        num_layers = self._model.kv_shape.num_layers
        cache = Cache(layers=[StepCacheLayer(*kv.buffers(layer), self._position) for layer in range(num_layers)])
        layers: list[int] = []
        context = AttentionContext(dense=True, decode=DecodeStep(self._position + 1), on_layer=layers.append)
        with attention_context(context):
            output = self._model.module(
                input_ids=self._token,
                position_ids=self._position.unsqueeze(0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if layers != list(range(num_layers)):
            raise RuntimeError(f"layers {layers} of {num_layers} came through this package's attention")
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits


class SequenceGraph:
    """One sequence's graph. It holds no KV, only its addresses: it is good as long as `kv.moves` stays."""

    def __init__(self, graph: torch.cuda.CUDAGraph, moves: int, retired: deque[torch.cuda.CUDAGraph]) -> None:
        self.graph: torch.cuda.CUDAGraph | None = graph
        self.moves = moves
        self.last_used = 0
        self._retired = retired

    def retire(self) -> None:
        """Gives the graph up; from any thread, while it is destroyed on the one that captures."""
        graph, self.graph = self.graph, None
        if graph is not None:
            self._retired.append(graph)


class GraphDecoder:
    """Decodes by graphs as far as the model allows.

    A sequence's first step runs launch by launch, its second is captured, and again where its KV has moved. All graphs
    share their intermediate memory: one runs at a time, and its logits are read before the next. Either way the same
    kernels run, so that logits do not depend on which step was captured.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._step = StaticStep(model)
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._logits: torch.Tensor | None = None
        self._pool: Any = None
        self._held: weakref.WeakSet[SequenceGraph] = weakref.WeakSet()
        self._retired: deque[torch.cuda.CUDAGraph] = deque()
        self._ticks = 0
        shape = model.kv_shape
        self.enabled = has_decode_kernel(shape.device, shape.dtype, shape.head_dim)
        if not self.enabled:
            logger.warning(
                "decode runs without CUDA graphs: no kernel for %s at head_dim %d on %s",
                shape.dtype,
                shape.head_dim,
                shape.device,
            )

    def decode(self, sequence: Sequence, token_id: int) -> torch.Tensor | None:
        """Appends one token. Returns its logits on the CPU; None where it cannot, and then nothing has changed.

        Raises:
            ValueError: past what was reserved.
        """
        self._retired.clear()
        if not self.enabled:
            return None
        self._ticks += 1
        position = sequence.num_tokens
        sequence.kv.make_room(position + 1)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                self._step.set(token_id, position)
                logits = self._run(sequence).cpu()
        except torch.cuda.OutOfMemoryError as error:
            self._abandon()
            torch.cuda.empty_cache()  # what the allocator holds back it cannot give to a capture
            logger.warning("a token is decoded without a CUDA graph: %s", error)
            return None
        except Exception as error:  # whatever a model's code raises while its launches are recorded
            self._abandon()
            self.enabled = False
            logger.warning("decode runs without CUDA graphs: %s: %s", type(error).__name__, error)
            for held in list(self._held):
                held.retire()
            self._retired.clear()
            return None
        sequence.kv.extend_to(position + 1)
        return logits

    def _run(self, sequence: Sequence) -> torch.Tensor:
        if not sequence.has_decoded or self._logits is None:
            sequence.has_decoded = True
            logits = self._step.run(sequence.kv)
            self._logits = logits.clone() if self._logits is None else self._logits
            return logits
        held = sequence.decode_graph
        if held is None or held.graph is None or held.moves != sequence.kv.moves:
            if held is not None:
                held.retire()  # the old one goes first
                sequence.decode_graph = None
            if not self._has_room():
                return self._step.run(sequence.kv)
            held = sequence.decode_graph = self._capture(sequence.kv, self._logits)
        held.last_used = self._ticks
        assert held.graph is not None
        held.graph.replay()
        return self._logits

    def _has_room(self) -> bool:
        """Room for one more graph, made where one was idle; sequences in turns would else capture at every token."""
        live = [held for held in self._held if held.graph is not None]
        if len(live) < _MOST_GRAPHS:
            return True
        idlest = min(live, key=lambda held: held.last_used)
        if self._ticks - idlest.last_used <= 2 * _MOST_GRAPHS:
            return False
        idlest.retire()
        return True

    def _abandon(self) -> None:
        """What was launched before an error may still write where the next step will."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _capture(self, kv: SessionKv, logits: torch.Tensor) -> SequenceGraph:
        self._retired.clear()
        if not any(held.graph is not None for held in self._held):
            self._pool = torch.cuda.graph_pool_handle()  # the memory of the last one went with it
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy KV meanwhile: only this one must do nothing that cannot be recorded.
        with _no_garbage_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits.copy_(self._step.run(kv))
            except BaseException:
                with suppress(RuntimeError):  # the error that is under way says more
                    graph.capture_end()
                raise
            graph.capture_end()
        held = SequenceGraph(graph, kv.moves, self._retired)
        self._held.add(held)
        return held


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
