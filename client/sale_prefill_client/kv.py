"""KV bytes, from a server or for one, as torch tensors, numpy arrays or a transformers cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .extras import require
from .options import Attention, Layout
from .results import KvSpec
from .tokens import TokenIds, token_array, token_digest

if TYPE_CHECKING:
    from torch import Tensor

_NUMPY_TYPES: dict[str, str] = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
    "int8": "i1",
}


@dataclass(frozen=True, eq=False, slots=True)
class KvCache:
    """A range of a session's KV cache in one block of host memory. Views share that memory.

    Args:
        session_id: session that it was read from.
        spec: format; `spec.layout` is the axis order of `buffer`.
        token_start, token_end: tokens held, half-open.
        layer_start, layer_end: decoder layers held, half-open.
        generation: generation of the session's contents that was read.
        token_digest: SHA-256 of the session's token ids before `token_end` (see `tokens.token_digest`).
        buffer: raw little-endian bytes, `[layers, 2, tokens, kv_heads, head_dim * element_bytes]` uint8 for the layout
            THD, `[layers, 2, kv_heads, tokens, head_dim * element_bytes]` for HTD; axis 1 is keys, values.
        token_ids: the session's token ids before `token_end`, `[token_end]` uint32; None where the source named none.
        attention: attention settings of the session, where known.
    """

    session_id: str
    spec: KvSpec
    token_start: int
    token_end: int
    layer_start: int
    layer_end: int
    generation: int
    token_digest: bytes
    buffer: npt.NDArray[np.uint8]
    token_ids: npt.NDArray[np.uint32] | None = None
    attention: Attention | None = None

    @classmethod
    def from_numpy(
        cls,
        array: npt.NDArray[Any],
        spec: KvSpec,
        *,
        token_ids: TokenIds | None = None,
        layout: Layout = "THD",
        session_id: str = "",
        attention: Attention | None = None,
    ) -> KvCache:
        """KV of a prompt in every layer, to push or to save; shares the array's memory where that is contiguous.

        Args:
            array: `[layers, 2, tokens, kv_heads, head_dim]` (THD) or `[layers, 2, kv_heads, tokens, head_dim]` (HTD) in
                the element type of `spec`, as `numpy()` gives it: bfloat16 as uint16, 8-bit floats as uint8.
            spec: format; `Client.get_server_info().kv_spec` is that of a server's model. Its layout does not matter.
            token_ids: tokens that the KV is of; `push_kv` wants to know them.
            layout: axis order of the array.
            session_id: where it is from.
            attention: settings that it was computed with.

        Raises:
            ValueError: the array's shape or type is not that of `spec`.
        """
        tokens = array.shape[2 if layout == "THD" else 3] if array.ndim == 5 else 0
        rows = (tokens, spec.num_kv_heads) if layout == "THD" else (spec.num_kv_heads, tokens)
        expected, element = (spec.num_layers, 2, *rows, spec.head_dim), np.dtype(_NUMPY_TYPES[spec.element_type])
        if array.shape != expected or array.dtype != element:
            raise ValueError(
                f"the array is {array.dtype} {list(array.shape)}; KV of this format in {layout} is {element} "
                f"[{spec.num_layers}, 2, {'tokens, heads' if layout == 'THD' else 'heads, tokens'}, {spec.head_dim}] "
                f"with {spec.num_kv_heads} heads"
            )
        known = None if token_ids is None else token_array(token_ids)
        if known is not None and len(known) != tokens:
            raise ValueError(f"there are {len(known)} token ids, and the array holds {tokens} tokens")
        return cls(
            session_id=session_id,
            spec=replace(spec, layout=layout),
            token_start=0,
            token_end=tokens,
            layer_start=0,
            layer_end=spec.num_layers,
            generation=0,
            token_digest=b"" if known is None else token_digest(known),
            buffer=np.ascontiguousarray(array).view(np.uint8),
            token_ids=known,
            attention=attention,
        )

    @classmethod
    def from_torch(cls, tensor: Tensor, spec: KvSpec, **options: Any) -> KvCache:
        """As `from_numpy`, from a tensor in the element type of `spec`, on any device; a contiguous one on the CPU is
        shared, others are copied.

        Raises:
            MissingExtraError: torch is not installed.
            ValueError: the tensor's shape or type is not that of `spec`.
        """
        torch = require("torch", extra="torch", purpose="KV from torch tensors")
        if tensor.dtype != getattr(torch, spec.element_type):
            raise ValueError(f"the tensor is {tensor.dtype}; KV of this format is {spec.element_type}")
        flat = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
        return cls.from_numpy(flat.view(_NUMPY_TYPES[spec.element_type]), spec, **options)

    @classmethod
    def from_dynamic_cache(cls, cache: Any, spec: KvSpec, **options: Any) -> KvCache:
        """KV that transformers computed, from a `DynamicCache` of batch 1, copied into THD.

        Args:
            cache: `[1, kv_heads, tokens, head_dim]` per layer, every layer with every token.
            spec: format of the server that it is for, `Client.get_server_info().kv_spec`.
            options: as of `from_numpy`, but for the layout.

        Raises:
            MissingExtraError: torch is not installed.
            ValueError: a layer's shape or type is not that of `spec`, as of one with a sliding window.
        """
        torch = require("torch", extra="torch", purpose="KV from a transformers cache")
        layers = cache.layers
        if len(layers) != spec.num_layers:
            raise ValueError(f"the cache has {len(layers)} layers; KV of this format has {spec.num_layers}")
        shapes = {tuple(tensor.shape) for layer in layers for tensor in (layer.keys, layer.values)}
        if len(shapes) != 1 or next(iter(shapes))[0] != 1:
            raise ValueError(f"keys and values must have one shape and batch 1; they have {sorted(shapes)}")
        first = layers[0].keys
        whole = torch.empty((len(layers), 2, first.shape[2], first.shape[1], first.shape[3]), dtype=first.dtype)
        for place, layer in zip(whole, layers, strict=True):
            place[0], place[1] = layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)
        return cls.from_torch(whole, spec, **options)

    def save(self, path: str | Path) -> None:
        """Write the KV to a safetensors file that says what it is of, with checksums; see `docs/kv-format.md`. The file
        appears whole, on disk, or not at all."""
        from .kv_file import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> KvCache:
        """KV from a file that `save` wrote, every byte checked. It is mapped, not copied: memory is taken as it is
        used; writing to it changes nothing in the file.

        Raises:
            ChecksumMismatchError: the file is not as it was written; metadata: file, and tensor where that is known.
            ValueError: another kind of file.
            OSError: it cannot be read.
        """
        from .kv_file import load

        return load(Path(path))

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self.token_end - self.token_start

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.buffer.nbytes

    def numpy(self, *, as_float32: bool = False) -> npt.NDArray[Any]:
        """The KV as one array, shaped as `buffer` with `head_dim` elements in the last axis.

        numpy has no bfloat16 and no 8-bit floats: without `as_float32` those come as their bit patterns (uint16,
        uint8) in a view of `buffer`. With it, every type is converted to float32 in new memory.

        Raises:
            ValueError: 8-bit floats as float32, which needs torch (`torch().float()`).
        """
        view = self.buffer.view(_NUMPY_TYPES[self.spec.element_type])
        if not as_float32:
            return view
        if self.spec.element_type == "bfloat16":
            return (view.astype("<u4") << 16).view("<f4")
        if self.spec.element_type.startswith("float8"):
            raise ValueError(f"numpy cannot convert {self.spec.element_type} to float32; use torch().float()")
        return view.astype("<f4")

    def torch(self) -> Tensor:
        """The KV as one CPU tensor in its own element type, a view shaped as `numpy()`.

        Raises:
            MissingExtraError: torch is not installed.
        """
        torch = require("torch", extra="torch", purpose="KV as torch tensors")
        tensor: Tensor = torch.from_numpy(self.buffer).view(getattr(torch, self.spec.element_type))
        return tensor

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one decoder layer, each `[tokens, kv_heads, head_dim]` (THD) or `[kv_heads, tokens,
        head_dim]` (HTD), as views.

        Args:
            layer: decoder layer of the model, from 0 (not an index into the range held).

        Raises:
            IndexError: the layer is not held.
        """
        if not self.layer_start <= layer < self.layer_end:
            raise IndexError(
                f"layer {layer} is not held; this cache has layers {self.layer_start}..{self.layer_end - 1}"
            )
        keys_and_values = self.torch()[layer - self.layer_start]
        return keys_and_values[0], keys_and_values[1]

    def require_whole(self, who: str) -> None:
        """ValueError where the first token or a layer is not held; `who` begins its message."""
        if self.token_start or self.layer_start or self.layer_end != self.spec.num_layers:
            raise ValueError(
                f"{who} every layer from token 0 on; this cache holds tokens "
                f"{self.token_start}..{self.token_end} of layers {self.layer_start}..{self.layer_end} of "
                f"{self.spec.num_layers}. Pull the whole session"
            )

    def to_dynamic_cache(self, config: Any = None) -> Any:
        """The KV as a `transformers.DynamicCache` of batch 1, `[1, kv_heads, tokens, head_dim]` per layer.

        Args:
            config: the model's configuration; needed only for models with sliding-window layers.

        Returns:
            transformers.DynamicCache: in new memory (the cache concatenates what it is given).

        Raises:
            MissingExtraError: torch or transformers is not installed.
            ValueError: the range lacks the first token or a layer, so no model could go on from it.
        """
        self.require_whole("a model needs")
        transformers = require("transformers", extra="torch", purpose="KV as a transformers cache")
        whole = self.torch()
        heads_first = whole if self.spec.layout == "HTD" else whole.transpose(2, 3)
        return transformers.DynamicCache(
            ddp_cache_data=[(kv[0][None], kv[1][None]) for kv in heads_first], config=config
        )
