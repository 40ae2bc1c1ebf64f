"""Capture attention traces: queries, keys and values of a real model on a real text, for `benchmarks.attention`.

    python -m benchmarks.capture_traces [MODEL] [--text FILE] [--tokens 8192] [--layers 4 11] [--out FOLDER]

MODEL is anything that the server takes: the default model's name, a directory, a .gguf file or a hub id. Without
`--text` the prompt is the Python language reference with one planted sentence, and a question for it at the end. One
file is written a layer and KV head (format: `benchmarks.attention_traces`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from benchmarks.attention_traces import cached_traces_dir, describe_scale, save_trace, slug
from benchmarks.texts import PASSWORD, reference_with_facts
from sale_prefill_server.engine.model import choose_device
from sale_prefill_server.models import DEFAULT_MODEL, ModelError, inspect_config, resolve_model

NAME = "sale-capture"
DEFAULT_TOKENS = 8192
DEFAULT_LAYERS = 4
_BUNDLED_TEXT = "Python language reference with one planted sentence and a question at the end"
# Most characters that one token stands for; only so much of a text is tokenized.
_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class Choice:
    """One trace to take: query heads (absolute indices) of one KV head of one layer."""

    layer: int
    kv_head: int
    query_heads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Captured:
    """What a choice's attention was given, on the CPU: `query [heads, tokens, d]`, the others `[1, tokens, d]`."""

    choice: Choice
    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float


@dataclass
class _Recorder:
    choices: Sequence[Choice]
    on_layer: Callable[[], object]
    taken: list[Captured] = field(default_factory=list)

    def take(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: Any) -> None:
        for choice in self.choices:
            if choice.layer == layer:
                if window is not None and window < keys.shape[2]:
                    raise SystemExit(f"layer {layer} has a sliding window of {window} tokens; choose others (--layers)")
                heads, kv = list(choice.query_heads), slice(choice.kv_head, choice.kv_head + 1)
                # Copies: indexing the query is one, and slices of keys and values would hold all heads in memory.
                self.taken.append(
                    Captured(
                        choice,
                        query[0, heads].cpu(),
                        keys[0, kv].clone().cpu(),
                        values[0, kv].clone().cpu(),
                        float(query.shape[3]) ** -0.5 if scale is None else scale,
                    )
                )
        self.on_layer()


_recorder: ContextVar[_Recorder | None] = ContextVar("attention_trace_recorder", default=None)


def capturing_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: SDPA that shows its inputs to whoever is capturing."""
    recorder = _recorder.get()
    if recorder is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        recorder.take(layer, query, key, value, scaling, kwargs.get("sliding_window"))
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return output


AttentionInterface.register(NAME, capturing_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.inference_mode()
def capture(
    model: Any, token_ids: Sequence[int], choices: Sequence[Choice], on_layer: Callable[[], object] = lambda: None
) -> list[Captured]:
    """Runs `token_ids` through `model` in one piece and returns what the chosen heads' attention was given.

    Args:
        model: a decoder (or causal LM) loaded with `attn_implementation=NAME`.
        token_ids: the prompt.
        choices: what to take; the results come in order of layers.
        on_layer: called after each layer's attention inputs are known.
    """
    recorder = _Recorder(choices, on_layer)
    token = _recorder.set(recorder)
    try:
        model(input_ids=torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    finally:
        _recorder.reset(token)
    return recorder.taken


def spread_layers(num_layers: int, count: int = DEFAULT_LAYERS) -> list[int]:
    """`count` layers (or all, where there are fewer), evenly spread."""
    count = min(count, num_layers)
    return [int((index + 0.5) * num_layers / count) for index in range(count)]


def choose_heads(
    config: Any, layers: Sequence[int] | None, kv_heads: Sequence[int], query_heads: Sequence[int] | None
) -> list[Choice]:
    """One choice a layer and KV head.

    Args:
        config: the model's text config.
        layers: None for `spread_layers`.
        kv_heads: of each layer.
        query_heads: absolute indices; None for all heads that share the KV head.

    Raises:
        SystemExit: the model has no such layer or head.
    """
    heads = config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or heads
    layers = spread_layers(config.num_hidden_layers) if layers is None else layers
    for name, chosen, count in (("layers", layers, config.num_hidden_layers), ("kv-heads", kv_heads, num_kv)):
        if bad := [index for index in chosen if not 0 <= index < count]:
            raise SystemExit(f"--{name} {bad[0]}: this model's are 0 to {count - 1}")
    group = heads // num_kv
    choices = []
    for layer in layers:
        for kv_head in kv_heads:
            members = range(kv_head * group, (kv_head + 1) * group)
            chosen = tuple(head for head in members if query_heads is None or head in query_heads)
            if not chosen:
                raise SystemExit(f"--query-heads: none of KV head {kv_head}'s, {members[0]} to {members[-1]}")
            choices.append(Choice(layer, kv_head, chosen))
    return choices


def bundled_prompt(tokens: int, tokenizer: Any) -> list[int]:
    """`tokens` ids: the Python language reference, a planted sentence in its middle, a question for it at the end."""
    question = tokenizer.encode(f"\n\n{PASSWORD.question}", add_special_tokens=False)
    document = tokenizer.encode(reference_with_facts(tokens, tokenizer, [PASSWORD]))
    return [*document[: tokens - len(question)], *question]


def text_prompt(file: Path, tokens: int, tokenizer: Any) -> list[int]:
    """The first `tokens` ids of a text file.

    Raises:
        SystemExit: it is shorter.
    """
    text = file.read_text(encoding="utf-8", errors="replace")[: tokens * _CHARACTERS_PER_TOKEN]
    ids: list[int] = tokenizer.encode(text)[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"{file} gives {len(ids)} tokens: say --tokens {len(ids)}, or take a longer text")
    return ids


def capture_to_folder(
    model_name: str,
    folder: Path,
    *,
    text: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] = (0,),
    query_heads: Sequence[int] | None = None,
    device: str = "auto",
) -> list[Path]:
    """Loads a model, captures, writes; see the command line for the arguments. Returns the files."""
    source = resolve_model(model_name, on_progress=lambda line: print(line, file=sys.stderr))
    config = inspect_config(source.path).get_text_config(decoder=True)
    if tokens > config.max_position_embeddings:
        raise SystemExit(f"--tokens {tokens}: {source.name} was made for {config.max_position_embeddings} at most")
    choices = choose_heads(config, layers, kv_heads, query_heads)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    prompt = bundled_prompt(tokens, tokenizer) if text is None else text_prompt(text, tokens, tokenizer)
    model = AutoModel.from_pretrained(source.path, dtype=torch.bfloat16, attn_implementation=NAME)
    model.eval().to(choose_device(device))
    with tqdm(total=config.num_hidden_layers, desc=f"{source.name}, {tokens} tokens", unit="layer") as bar:
        captured = capture(model, prompt, choices, on_layer=bar.update)
    about = (f"{source.name} (bf16 compute)", _BUNDLED_TEXT if text is None else text.name)
    return _write(captured, folder, f"{slug(source.name)}_{'reference' if text is None else slug(text.stem)}", *about)


def _write(captured: Sequence[Captured], folder: Path, stem: str, model: str, text: str) -> list[Path]:
    files = []
    with _published_together(folder) as scratch:
        for item in captured:
            place = f"layer{item.choice.layer:02d}_kv{item.choice.kv_head}"
            name = f"{stem}{item.query.shape[1]}_{place}.safetensors"
            save_trace(scratch / name, item.query, item.keys, item.values, _metadata(item, model=model, text=text))
            files.append(folder / name)
    return files


def _metadata(item: Captured, *, model: str, text: str) -> dict[str, str]:
    _, tokens, head_dim = item.query.shape
    return {
        "model": model,
        "text": text,
        "layout": "[heads, tokens, head_dim]",
        "layer": str(item.choice.layer),
        "kv_head": str(item.choice.kv_head),
        "query_heads": ",".join(str(head) for head in item.choice.query_heads),
        "tokens": str(tokens),
        "scale": describe_scale(item.scale, head_dim),
        "rope": "applied",
        "dtype": str(item.query.dtype).removeprefix("torch."),
    }


@contextmanager
def _published_together(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move to `folder` at the end, so that an interrupted run leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".capturing-", dir=folder) as scratch:
        yield Path(scratch)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--text", type=Path, metavar="FILE", help="prompt's text; default: a bundled one")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="prompt's length (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", help=f"default: {DEFAULT_LAYERS}, evenly spread")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[0], help="of each layer (default: 0)")
    parser.add_argument("--query-heads", type=int, nargs="+", help="default: all that share the KV head")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the model's folder in the user's cache")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Captures. Returns an exit status."""
    options = parse_arguments(arguments)
    try:
        files = capture_to_folder(
            options.model,
            options.out or cached_traces_dir(options.model),
            text=options.text,
            tokens=options.tokens,
            layers=options.layers,
            kv_heads=options.kv_heads,
            query_heads=options.query_heads,
            device=options.device,
        )
    except ModelError as error:
        print(f"capture_traces: {error}", file=sys.stderr)
        return 1
    for file in files:
        print(f"{file}  {file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
