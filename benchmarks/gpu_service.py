"""The service on a GPU, through gRPC: time to the first token of an 8B-shaped model, answers of the default model.

    python -m benchmarks.gpu_service [--only dense large default] [--lengths 65536 131072] [--json FILE]

`large` takes $SALE_PREFILL_TRACES (a folder of .safetensors) for queries and keys: see `benchmarks.gpu_server`.
`default` needs the default model in the cache, or pip. `dense` times ways to run dense rows behind a prefix.
`--device cpu --tiny` tries everything out without a GPU.

On one H100 with the kernels built: `dense` about 15 s; `large` 30 s to start and warm up, then about 20 s a round
at 64K and 45 s at 128K (dense and two strides of SALE); `default` a minute, most of it the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_traces import locate_traces
from benchmarks.gpu_rows import Row, print_rows, write_rows
from benchmarks.gpu_server import ChildServer, Inside, RandomLlama, child_server
from benchmarks.served import question_prompt
from benchmarks.texts import PASSWORD, RESTAURANT, documents
from sale_attention import BlockGrid, KvView, SaleConfig, get_backend
from sale_prefill_client import Attention, Client, DecodedToken, PrefillStats
from sale_prefill_client.errors import SalePrefillError
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.kv.pool import KvPool

LLAMA_8B = RandomLlama(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=128_256,
    context=131_072 + 1024,
)
TINY = replace(LLAMA_8B, layers=2, hidden=256, heads=4, kv_heads=2, intermediate=512, vocabulary=512)

LENGTHS = (65_536, 131_072)
#: Dense time to the first token over SALE's, by prompt length: required, and aimed at.
SPEEDUPS = {65_536: (1.4, 1.6), 131_072: (2.0, 2.3)}
THRESHOLD = 0.004
STRIDES = (2, 4)
DECODE_TOKENS = 64
WARM_UP_TOKENS = 16_384
PHASES = ("quantise", "sink_local", "select", "compute", "dense")

ANSWER_TOKENS = 48
#: Prompts whose text goes on freely: no right answer, so that close calls show.
CONTINUATION_TOKENS = 3000
#: Questions that the default model answers without a close call: its second best token is everywhere less likely by
#: half a unit of natural log-probability or more, where bfloat16 logits come in steps of an eighth. Planted facts:
#: tokens, and where the text starts.
QUESTIONS = {"password, 4K": (PASSWORD, 4096, 0), "password, 6.8K": (PASSWORD, 6800, 60_000)}
CHATS = {
    "France": "What is the capital of France? Answer in one sentence.",
    "Japan": "What is the capital of Japan?",
    "Germany": "What is the capital of Germany?",
}
#: A question that has close calls.
CLOSE_QUESTION = (RESTAURANT, 5200, 30_000)


@dataclass(frozen=True)
class Timed:
    """One prompt through gRPC: seconds by the caller's clock, the server's report, and its inside."""

    first_token_seconds: float
    prefill_seconds: float
    token_seconds: float
    stats: PrefillStats
    inside: Inside

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase, the rest of the model as `other`, and outside of the engine as `outside`."""
        phases = {name: self.inside.phase_seconds.get(name, 0.0) for name in PHASES}
        other = max(0.0, self.stats.compute_seconds - sum(phases.values()))
        outside = max(0.0, self.first_token_seconds - self.stats.compute_seconds)
        return {**phases, "other": other, "outside": outside}

    def describe(self) -> str:
        """Phases in seconds and as shares of the time to the first token."""
        total = self.first_token_seconds
        return ", ".join(
            f"{name} {seconds:.2f} s ({seconds / total:.0%})" for name, seconds in self.phase_seconds.items() if seconds
        )

    def as_json(self) -> dict[str, Any]:
        """For a row's details."""
        return {
            "first_token_seconds": round(self.first_token_seconds, 4),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "phase_seconds": {name: round(seconds, 4) for name, seconds in self.phase_seconds.items()},
            "density": round(self.stats.density, 4),
            "dense_fallbacks": {entry.reason: entry.num_rows for entry in self.stats.dense_fallbacks},
            "backend": self.stats.attention_backend,
            "peak_gib": round(self.inside.peak_bytes / 2**30, 2),
            "reserved_gib": round(self.inside.reserved_bytes / 2**30, 2),
        }


def timed_prompt(server: ChildServer, prompt: list[int], attention: Attention, answer_tokens: int = 1) -> Timed:
    """Prefills in a new session, decodes greedily, frees the session."""
    client = server.client
    started = time.perf_counter()
    result = client.prefill(prompt, attention=attention)
    prefill_seconds = time.perf_counter() - started
    inside = server.inside()  # a few milliseconds, which do not count
    resumed = time.perf_counter()
    with client.decode(result.session_id, max_new_tokens=answer_tokens, ignore_eos=True) as stream:
        next(stream)
        first = time.perf_counter()
        more = len(list(stream))
        last = time.perf_counter()
    client.delete_session(result.session_id)
    token_seconds = (last - first) / more if more else 0.0
    return Timed(prefill_seconds + first - resumed, prefill_seconds, token_seconds, result.stats, inside)


def measure_large_model(
    lengths: Sequence[int] = LENGTHS,
    *,
    strides: Sequence[int] = STRIDES,
    rounds: int = 1,
    device: str = "cuda",
    chunk_tokens: int = 0,
    decode_tokens: int = DECODE_TOKENS,
    model: RandomLlama = LLAMA_8B,
    traces: Path | None = None,
    torch_dense: bool = False,
    turn_tiles: bool = True,
) -> list[Row]:
    """Time to the first token, dense against SALE, and decode speed.

    Args:
        lengths: prompt lengths.
        strides: query strides of SALE; the requirement is on the first.
        rounds: times that every cell is measured; medians count.
        device: of the server.
        chunk_tokens: prefill chunk; 0 is the server's default.
        decode_tokens: tokens that decode speed is taken over, after the shortest prompt; 0 leaves it out.
        model: shape of the model.
        traces: folder of traces; None looks where `locate_traces` does.
        torch_dense: dense attention is torch's SDPA, whatever the server would take.
        turn_tiles: copies of a trace stand where rotary embedding would put them (`gpu_server`).
    """
    files = tuple(locate_traces(traces))
    model = replace(model, traces=files, turn_tiles=turn_tiles)
    ways = {"dense": Attention.dense(), **{f"SALE stride {n}": Attention.sale(THRESHOLD, n) for n in strides}}
    settings = {"device": device, "chunk_tokens": chunk_tokens, "model": "random-llama", "prefix_reuse": False}
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = torch.randint(model.vocabulary, (max(lengths),), generator=generator).tolist()
    runs: dict[tuple[int, str], list[Timed]] = {(n, way): [] for n in lengths for way in ways}
    rows: list[Row] = []
    with child_server(settings, model, torch_dense=torch_dense) as server:
        names = ", ".join(file.stem for file in files)
        _say(f"server ready after {server.start_seconds:.1f} s; queries and keys from {names}")
        for way, attention in ways.items():
            run = timed_prompt(server, tokens[: min(WARM_UP_TOKENS, min(lengths))], attention, 2)
            _say(f"warm-up, {way}: {run.first_token_seconds:.2f} s")
        for length in sorted(lengths):
            try:
                _touch_memory(server, tokens[:128], length)
                for round_ in range(rounds):
                    for way, attention in ways.items():
                        more = decode_tokens if length == min(lengths) and round_ == 0 else 0
                        run = timed_prompt(server, tokens[:length], attention, 1 + more)
                        runs[length, way].append(run)
                        _say(
                            f"{length} tokens, {way}: first token {run.first_token_seconds:.3f} s, density "
                            f"{run.stats.density:.3f}, {run.inside.reserved_bytes / 2**30:.1f} GiB: {run.describe()}"
                        )
            except SalePrefillError as error:  # such as no memory for the longest: the shorter ones still count
                rows.append(Row(f"{length // 1024}K prompt, 8B-shaped", "runs", "", str(error)[:200], False))
                continue
            rows += _first_token_rows(length, {way: runs[length, way] for way in ways}, files)
    if decode_tokens:
        rows += _decode_rows(min(lengths), {way: run for way in ways for run in runs[min(lengths), way][:1]})
    return rows


def _touch_memory(server: ChildServer, prompt: list[int], length: int) -> None:
    """Has the server allocate KV of `length` tokens once: else the way that comes first pays for it alone."""
    client = server.client
    session = client.prefill(prompt, attention=Attention.dense()).session_id
    with client.decode(session, max_new_tokens=length - len(prompt), ignore_eos=True) as stream:
        next(stream)
    client.delete_session(session, force=True)
    while client.get_load().kv_used_bytes:  # the decode stops after its token
        time.sleep(0.05)


def _first_token_rows(length: int, runs: dict[str, list[Timed]], files: Sequence[Path]) -> list[Row]:
    medians = {way: statistics.median(run.first_token_seconds for run in taken) for way, taken in runs.items()}
    required, aim = SPEEDUPS.get(length, (None, None))
    rows: list[Row] = []
    for way in runs:
        if way == "dense":
            continue
        speedup = medians["dense"] / medians[way]
        counts = required is not None and not rows
        details = {name: [run.as_json() for run in runs[name]] for name in ("dense", way)}
        rows.append(
            Row(
                f"{length // 1024}K prompt, 8B-shaped: time to first token, dense over {way}",
                f">= {required:.1f}x" if counts else "",
                f"{aim:.1f}x" if counts else "",
                f"{speedup:.2f}x ({medians['dense']:.2f} s / {medians[way]:.2f} s), density "
                f"{runs[way][0].stats.density:.3f}",
                not counts or speedup >= (required or 0.0),
                {"traces": [file.stem for file in files], **details},
            )
        )
    for way, taken in runs.items():
        rows.append(Row(f"... phases, {way}", "", "", taken[0].describe(), True))
    return rows


def _decode_rows(length: int, runs: dict[str, Timed]) -> list[Row]:
    return [
        Row(
            f"decode after a {length // 1024}K prompt ({way}), one session",
            "",
            "",
            f"{1e3 * run.token_seconds:.2f} ms a token, {1 / run.token_seconds:.1f} tokens/s",
            True,
            {"token_seconds": run.token_seconds},
        )
        for way, run in runs.items()
        if run.token_seconds
    ]


def measure_engine_decode(tokens: int = 65_536, count: int = 32, model: RandomLlama = LLAMA_8B) -> list[Row]:
    """Milliseconds of a decoded token in the engine behind `tokens` of KV, by CUDA graphs and launch by launch."""
    device = torch.device("cuda:0")
    loaded = model.build(device)
    settings = AttentionSettings(AttentionMode.DENSE, THRESHOLD, 1)
    found = {}
    for name, graphs in (("launch by launch", False), ("graphs", True)):
        engine = Engine(
            loaded,
            KvPool(loaded.kv_shape, 12 << 30),
            settings,
            SaleConfig(),
            chunk_tokens=8192,
            attention_backend="auto",
            decode_graphs=graphs,
        )
        sequence = engine.open(settings)
        sequence.kv.reserve(tokens + count)
        sequence.kv.extend_to(tokens)
        taken = []
        for token in range(count):
            started = time.perf_counter()
            engine.decode_token(sequence, token)
            taken.append(1e3 * (time.perf_counter() - started))
        found[name] = statistics.median(taken[4:])
        sequence.release()
    weights = sum(weight.numel() * weight.element_size() for weight in loaded.module.parameters())
    floor = (weights + tokens * loaded.kv_shape.bytes_per_token) / 3.0e12 * 1e3
    measured = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in found.items())
    line = f"decode in the engine, 8B-shaped, {tokens // 1024}K of KV, a token"
    return [Row(line, "", "", f"{measured}; {floor:.2f} ms at 3.0 TB/s", True, found)]


@dataclass(frozen=True)
class Comparison:
    """Greedy answers of two servers to one prompt.

    `same_tokens` counts what they agree on from the start; where they part, `gap` is by how much the reference prefers
    its own token, in natural log-probability (None where the other's token is not among its best). `margin` is the
    closest call of the reference's whole answer.
    """

    name: str
    attention: str
    expected_text: str
    got_text: str
    tokens: int
    same_tokens: int
    gap: float | None
    margin: float
    expected_words: str

    @property
    def same(self) -> bool:
        """Every token."""
        return self.same_tokens == self.tokens

    @property
    def right(self) -> bool:
        """Both answers contain the words asked for."""
        return all(self.expected_words in text for text in (self.expected_text, self.got_text))


def measure_default_model(
    *, device: str = "cuda", reference: str = "cpu", answer_tokens: int = ANSWER_TOKENS, questions: int | None = None
) -> list[Row]:
    """The default model's greedy answers on `device` against those on `reference`, SALE and dense.

    An answer is what `make check-attention` means by it: the greedy tokens up to the end of the answer, 48 at most.
    Answers to questions must be the same token by token; how far free continuations agree is information, as they go
    on through close calls that bfloat16 decides by rounding. The two devices have blocks of their own sizes, so
    SALE keeps other blocks on each.

    Args:
        device: of the server that is checked.
        reference: of the server it is checked against.
        answer_tokens: most tokens of an answer.
        questions: take that many prompts of each kind only.
    """
    # A GPU runs prompts of this length and model dense, left to itself.
    settings = {"dense_rows": SaleConfig().dense_rows, "prefix_reuse": False}
    with (
        child_server({"device": reference, **settings}) as expected,
        child_server({"device": device, **settings}) as got,
    ):
        _say(f"servers ready after {expected.start_seconds:.1f} and {got.start_seconds:.1f} s")
        tokenizer = expected.client.tokenizer()
        prompts = {
            name: (question_prompt(length, tokenizer, fact, offset), fact.answer)
            for name, (fact, length, offset) in QUESTIONS.items()
        }
        for name, question in CHATS.items():
            messages = [{"role": "user", "content": question}]
            prompts[name] = (tokenizer.apply_chat_template(messages, tokenize=True), "")
        texts = {name: (ids, "") for name, ids in documents(CONTINUATION_TOKENS, tokenizer).items()}
        fact, length, offset = CLOSE_QUESTION
        texts["restaurant, 5.2K"] = (question_prompt(length, tokenizer, fact, offset), fact.answer)
        compared: dict[str, list[Comparison]] = {"questions": [], "continuations": []}
        for mode, attention in {"SALE": Attention.sale(THRESHOLD), "dense": Attention.dense()}.items():
            for kind, chosen in {"questions": prompts, "continuations": texts}.items():
                for name, (prompt, words) in list(chosen.items())[:questions]:
                    found = _compare((expected.client, got.client), prompt, attention, answer_tokens, kind)
                    texts_ = [tokenizer.decode([token.token_id for token in answer]) for answer in found]
                    compared[kind].append(_comparison(name, mode, found, texts_, words))
                    _say(_describe(compared[kind][-1]))
    return _answer_rows(compared, f"{device} against {reference}")


def _compare(
    clients: tuple[Client, Client], prompt: list[int], attention: Attention, answer_tokens: int, kind: str
) -> list[list[DecodedToken]]:
    answers = []
    for client in clients:
        session = client.prefill(prompt, attention=attention).session_id
        answer = client.generate(
            session, max_new_tokens=answer_tokens, num_top_logprobs=10, ignore_eos=kind == "continuations"
        )
        answers.append(list(answer.tokens))
        client.delete_session(session)
    return answers


def _comparison(name: str, mode: str, answers: list[list[DecodedToken]], texts: list[str], words: str) -> Comparison:
    expected, got = answers
    pairs = list(zip(expected, got, strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a.token_id != b.token_id), len(pairs))
    gap = None
    if same < len(pairs):
        token, other = pairs[same]
        logprobs = {entry.token_id: entry.logprob for entry in token.top_logprobs}
        gap = token.logprob - logprobs[other.token_id] if other.token_id in logprobs else None
    margin = min(token.top_logprobs[0].logprob - token.top_logprobs[1].logprob for token in expected)
    return Comparison(name, mode, texts[0], texts[1], max(len(expected), len(got)), same, gap, margin, words)


def _describe(found: Comparison) -> str:
    if found.same:
        return (
            f"{found.attention}, {found.name}: all {found.tokens} tokens the same (closest call {found.margin:.3f}): "
            f"{found.got_text[:60]!r}"
        )
    gap = "not among the best 10" if found.gap is None else f"{found.gap:.3f} less likely by the reference"
    return (
        f"{found.attention}, {found.name}: {found.same_tokens} of {found.tokens} tokens the same, then one that is "
        f"{gap}: "
        f"{found.expected_text[:60]!r} against {found.got_text[:60]!r}"
    )


def _answer_rows(compared: dict[str, list[Comparison]], devices: str) -> list[Row]:
    rows = []
    for mode in ("SALE", "dense"):
        asked = [found for found in compared["questions"] if found.attention == mode]
        same = sum(found.same for found in asked)
        rows.append(
            Row(
                f"default model, greedy answers through gRPC, {devices}, {mode}",
                "the same, planted facts found",
                "",
                f"{same} of {len(asked)} the same, {sum(found.right for found in asked)} right, closest call "
                f"{min(found.margin for found in asked):.3f}",
                same == len(asked) and all(found.right for found in asked),
                {"answers": [vars(found) for found in asked]},
            )
        )
        free = [found for found in compared["continuations"] if found.attention == mode]
        firsts = ", ".join(f"{found.same_tokens} of {found.tokens}" for found in free)
        gaps = [found.gap for found in free if found.gap is not None]
        parted = f"; widest gap where they part {max(gaps):.3f}" if gaps else ""
        details = {"continuations": [vars(found) for found in free]}
        rows.append(Row(f"... tokens until free continuations part, {mode}", "", "", firsts + parted, True, details))
    return rows


def measure_dense_kernels(
    length: int = 65_536, chunk: int = 8192, *, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> list[Row]:
    """Ways to run the dense attention of one layer's last chunk; random inputs, bfloat16, on the first GPU."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    query = random(1, chunk, heads, head_dim).transpose(1, 2)
    kv = KvView(random(1, kv_heads, length, head_dim), random(1, kv_heads, length, head_dim))
    scale = head_dim**-0.5
    pairs = heads * chunk * (length - chunk / 2)
    rows, reference = [], None
    for name, call in _dense_ways(query, kv, scale).items():
        try:
            output = call()
            seconds = _seconds(call, device)
        except (RuntimeError, TypeError) as error:  # of a build of torch without it
            rows.append(Row(f"dense chunk, {name}", "", "", f"not here: {str(error).splitlines()[0][:80]}", True))
            continue
        reference = output if reference is None else reference
        error_l2 = float((output - reference).float().norm() / reference.float().norm())
        measured = f"{1e3 * seconds:.2f} ms, {4 * head_dim * pairs / seconds / 1e12:.0f} TFLOPS, off by {error_l2:.4f}"
        rows.append(Row(f"dense chunk, rows {length - chunk} to {length}: {name}", "", "", measured, True))
        _say(f"{rows[-1].line}: {measured}")
    return rows


def _dense_ways(query: Tensor, kv: KvView, scale: float) -> dict[str, Callable[[], Tensor]]:
    rows, length = query.shape[2], kv.tokens
    backend = get_backend("auto", query.device)
    grid = BlockGrid.of(rows, length, SaleConfig(query_block=backend.query_block))

    def lower_right() -> Tensor:
        bias = causal_lower_right(rows, length)
        return scaled_dot_product_attention(query, kv.keys, kv.values, attn_mask=bias, scale=scale, enable_gqa=True)

    def own() -> Tensor:
        output = torch.empty_like(query)
        backend.attend_all(query, kv, grid, scale, output, None)
        return output

    def merged() -> Tensor:
        """cuDNN knows causality only from the upper left: the prefix without a mask, the chunk with one."""
        split = length - rows
        parts = []
        for keys, values, causal in (
            (kv.keys[:, :, :split], kv.values[:, :, :split], False),
            (kv.keys[:, :, split:], kv.values[:, :, split:], True),
        ):
            output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, keys, values, None, True, 0.0, causal, False, scale=scale
            )
            parts.append((output, lse.reshape(*query.shape[:3], 1)))
        weight = torch.sigmoid(parts[0][1] - parts[1][1]).to(query.dtype)
        return torch.lerp(parts[1][0], parts[0][0], weight)

    return {"torch SDPA, lower right (FlashAttention-2)": lower_right, "own kernel": own, "cuDNN, merged": merged}


def _seconds(call: Callable[[], Tensor], device: torch.device, repeats: int = 5) -> float:
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _say(text: str) -> None:
    print(f"     {text}", flush=True)


def main() -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("dense", "large", "default"), help="these parts only")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="prompt lengths of `large`")
    parser.add_argument("--strides", nargs="+", type=int, default=list(STRIDES), help="query strides of `large`")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each cell of `large`")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="prefill chunk of `large`; 0: the server's default")
    parser.add_argument("--decode-tokens", type=int, default=DECODE_TOKENS, help="0 leaves decode speed out")
    parser.add_argument("--traces", type=Path, help="folder of traces")
    parser.add_argument("--torch-dense", action="store_true", help="dense of `large` by torch's SDPA in any case")
    parser.add_argument("--plain-tiles", action="store_true", help="repeat traces as they are, not turned on")
    parser.add_argument("--device", default="cuda", help="what is measured")
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS, help="most tokens of an answer")
    parser.add_argument("--questions", type=int, help="that many prompts of each kind of `default` only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small tensors, to try this out")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "dense": lambda: measure_dense_kernels(*((2048, 512) if arguments.tiny else ())),
        "large": lambda: measure_large_model(
            arguments.lengths,
            strides=arguments.strides,
            rounds=arguments.rounds,
            device=arguments.device,
            chunk_tokens=arguments.chunk_tokens,
            decode_tokens=arguments.decode_tokens,
            model=TINY if arguments.tiny else LLAMA_8B,
            traces=arguments.traces,
            torch_dense=arguments.torch_dense,
            turn_tiles=not arguments.plain_tiles,
        ),
        "default": lambda: measure_default_model(
            device=arguments.device, answer_tokens=arguments.answer_tokens, questions=arguments.questions
        ),
    }
    rows: list[Row] = []
    for name in arguments.only or parts:
        started = time.perf_counter()
        try:
            rows += parts[name]()
        except (Exception, SystemExit):  # the other parts are worth having
            traceback.print_exc()
            rows.append(Row(name, "runs", "", "failed: see the traceback", False))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _say(f"{name} took {time.perf_counter() - started:.0f} s")
        if arguments.json:  # after every part, so that a run that is cut short leaves what it has
            write_rows(arguments.json, rows, "python -m benchmarks.gpu_service")
    print_rows(rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
