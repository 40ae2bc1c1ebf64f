"""Real attention traces: where they are, and how they are read and written.

A trace is a safetensors file with the queries `q [heads, tokens, head_dim]` of some heads that share a KV head, their
keys `k` and values `v` `[1, tokens, head_dim]`, after rotary embedding, and what they are in the file's metadata.
Attention of random tensors is not sparse, so figures are measured on these. `benchmarks.capture_traces` writes them.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import ROOT
from sale_attention import KvView
from sale_prefill_server.models.cache import default_cache_dir

TRACES_VARIABLE = "SALE_PREFILL_TRACES"
_ROOT_SCALE = re.compile(r"1/sqrt\((\d+)\)")


@dataclass(frozen=True, eq=False)
class Trace:
    """Attention inputs of some query heads of one KV head.

    Attributes:
        name: layer and KV head, or the file's name where it does not say.
        model: what the trace was taken from.
        query: `[1, heads, tokens, head_dim]`.
        keys: `[1, 1, tokens, head_dim]`.
        values: `[1, 1, tokens, head_dim]`.
        scale: softmax scale.
    """

    name: str
    model: str
    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.query.shape[2]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def head_dim(self) -> int:
        """Size of one query."""
        return self.query.shape[3]

    @property
    def kv(self) -> KvView:
        """Keys and values as `attend` takes them."""
        return KvView(self.keys, self.values)

    def prefix(self, tokens: int, device: torch.device | None = None) -> Trace:
        """The first `tokens` tokens, contiguous, on `device`."""
        query, keys, values = (
            tensor[:, :, :tokens].contiguous().to(device) for tensor in (self.query, self.keys, self.values)
        )
        return Trace(self.name, self.model, query, keys, values, self.scale)


def load_trace(path: Path) -> Trace:
    """Reads one file.

    Raises:
        SystemExit: it is not a trace.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if missing := {"q", "k", "v"} - set(file.keys()):
            raise SystemExit(f"{path}: not an attention trace, it lacks {', '.join(sorted(missing))}")
        query, keys, values = (file.get_tensor(name).unsqueeze(0) for name in "qkv")
    name = f"layer{int(metadata['layer']):02d}_kv{metadata['kv_head']}" if "layer" in metadata else path.stem
    return Trace(name, metadata.get("model", path.stem), query, keys, values, parse_scale(metadata, query.shape[3]))


def save_trace(path: Path, query: Tensor, keys: Tensor, values: Tensor, metadata: Mapping[str, str]) -> None:
    """Writes `q [heads, tokens, head_dim]`, `k` and `v` `[1, tokens, head_dim]` with `metadata`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"q": query.contiguous(), "k": keys.contiguous(), "v": values.contiguous()}
    save_file(tensors, path, metadata=dict(metadata))


def parse_scale(metadata: Mapping[str, str], head_dim: int) -> float:
    """The softmax scale that a trace's metadata names, as a number or `1/sqrt(n)`; `1/sqrt(head_dim)` by default."""
    text = metadata.get("scale", f"1/sqrt({head_dim})")
    root = _ROOT_SCALE.fullmatch(text)
    return 1.0 / math.sqrt(int(root[1])) if root else float(text)


def describe_scale(scale: float, head_dim: int) -> str:
    """The inverse of `parse_scale`."""
    return f"1/sqrt({head_dim})" if math.isclose(scale, 1.0 / math.sqrt(head_dim)) else repr(scale)


def cached_traces_dir(model: str) -> Path:
    """Where `benchmarks.capture_traces` puts traces of `model` unless told otherwise."""
    return default_cache_dir() / "traces" / slug(model)


def slug(text: str) -> str:
    """`text` as a part of a file name: lower case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def locate_traces(folder: Path | None = None) -> list[Path]:
    """Files of the traces to measure on, by name.

    Looks in `folder`, else in `$SALE_PREFILL_TRACES`, else in `../shared/traces` beside the repository; without any of
    them, captures the default model's at 8K into the user's cache, and says so.

    Raises:
        SystemExit: the folder that was named holds none.
    """
    named = folder or (Path(os.environ[TRACES_VARIABLE]) if os.environ.get(TRACES_VARIABLE) else None)
    if named is not None:
        if not (found := sorted(named.glob("*.safetensors"))):
            raise SystemExit(f"{named} holds no attention traces (*.safetensors); write some: capture_traces --out")
        return found
    if found := sorted((ROOT.parent / "shared" / "traces").glob("*.safetensors")):
        return found
    return _default_models_traces()


def _default_models_traces() -> list[Path]:
    from benchmarks.capture_traces import DEFAULT_TOKENS, capture_to_folder
    from sale_prefill_server.models import DEFAULT_MODEL

    folder = cached_traces_dir(DEFAULT_MODEL)
    if not (found := sorted(folder.glob("*.safetensors"))):
        print(f"no attention traces here: capturing {DEFAULT_TOKENS} tokens of {DEFAULT_MODEL}", file=sys.stderr)
        found = capture_to_folder(DEFAULT_MODEL, folder)
    print(f"measuring on traces of the default model in {folder}; ${TRACES_VARIABLE} names others", file=sys.stderr)
    return found
