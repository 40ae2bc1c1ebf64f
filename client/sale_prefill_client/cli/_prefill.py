"""`sale-prefill prefill`."""

from __future__ import annotations

import argparse

from ..options import Attention
from ..results import PrefillResult, PrefillStats
from . import _exit
from ._arguments import (
    Command,
    add_connection_arguments,
    add_progress_argument,
    add_survival_arguments,
    connect,
    duration,
    label,
    new_parser,
    wants_progress,
)
from ._exit import UsageError
from ._output import plain, seconds, size, write_facts, write_json, write_table
from ._prompt import add_prompt_arguments, chat_token_ids, prompt_token_ids, read_prompt

COMMAND = Command(
    "prefill",
    "compute the KV cache of a prompt and keep it on the server as a session",
    "sale-prefill prefill report.txt --chat --lease 10m",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = new_parser(commands, COMMAND)
    parser.set_defaults(run=run)
    add_prompt_arguments(parser, chat_help="send the prompt as a user's message, through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message before it; needs --chat")
    group = parser.add_argument_group("session")
    group.add_argument("--session", metavar="ID", help="append to this session, or create it under this id")
    group.add_argument("--request-id", metavar="ID", help="idempotency key: a repeat joins the running request")
    group.add_argument("--expect-prefix", metavar="N", type=int, help="tokens that the session must hold already")
    group.add_argument("--lease", metavar="DURATION", type=duration, help="how long to keep the KV, such as 10m")
    group.add_argument("--sliding", action="store_true", help="later requests extend the lease")
    add_survival_arguments(group)
    group.add_argument("--no-prefix-reuse", action="store_true", help="compute every token, whatever KV is there")
    group.add_argument("--label", metavar="KEY=VALUE", type=label, action="append", help="label of a new session")
    group.add_argument("--on-interrupt", choices=("keep", "free"), default="keep", help="half-done work when cancelled")
    group = parser.add_argument_group("attention")
    group.add_argument("--attention", choices=("sale", "dense"), help="method; the server's default where left out")
    group.add_argument("--threshold", metavar="TAU", type=float, help="SALE threshold, above 0 and at most 1")
    group.add_argument("--query-stride", metavar="N", type=int, help="estimate from every n-th query row: 1, 2 or 4")
    group.add_argument(
        "--error-budget",
        metavar="NATS",
        type=float,
        help="most that attention may change predictions, by the server's profile; dense where that is too much",
    )
    parser.add_argument("--top", metavar="N", type=int, help="logits of the last position to return")
    parser.add_argument("--layers", action="store_true", help="print the density of each layer")
    add_progress_argument(parser)
    add_connection_arguments(parser)


def _attention(arguments: argparse.Namespace) -> Attention | None:
    asked = (arguments.threshold, arguments.query_stride, arguments.error_budget)
    if arguments.attention is None and asked == (None, None, None):
        return None
    return Attention(arguments.attention or "sale", *asked)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    prompt = read_prompt(arguments)
    if prompt is None:
        raise UsageError("prefill needs a prompt: a file, - for standard input, or --prompt TEXT")
    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system is part of a chat; add --chat")
    with connect(arguments) as client:
        token_ids = None
        if arguments.tokens:
            token_ids = prompt_token_ids(prompt)
        elif arguments.chat:
            token_ids = chat_token_ids(client, prompt, arguments.system)
        result = client.prefill(
            token_ids,
            text=prompt if token_ids is None else None,
            progress=wants_progress(arguments),
            timeout_seconds=arguments.timeout,
            session_id=arguments.session,
            request_id=arguments.request_id,
            expected_prefix_tokens=arguments.expect_prefix,
            attention=_attention(arguments),
            lease_seconds=arguments.lease,
            sliding=arguments.sliding,
            durability=arguments.durability,
            pin=arguments.pin,
            prefix_reuse=False if arguments.no_prefix_reuse else None,
            on_interrupt=arguments.on_interrupt,
            num_top_logits=arguments.top,
            labels=dict(arguments.label or ()),
        )
    if arguments.json:
        stats = plain(result.stats) | {
            "sparsity": result.stats.sparsity,
            "tokens_per_second": result.stats.tokens_per_second,
        }
        write_json(plain(result) | {"stats": stats})
    else:
        _report(result, with_layers=arguments.layers)
    return _exit.OK


def _cached(stats: PrefillStats) -> str:
    sources = (("from other sessions", stats.prefix_tokens), ("from a slower tier", stats.restored_tokens))
    parts = [f"{count} {source}" for source, count in sources if count]
    return f"{stats.cached_tokens} cached" + (f", of them {' and '.join(parts)}" if parts else "")


def _report(result: PrefillResult, *, with_layers: bool) -> None:
    session, stats = result.session, result.stats
    facts = [
        ("session", session.session_id),
        ("tokens", f"{session.num_tokens} ({stats.computed_tokens} computed, {_cached(stats)})"),
        ("speed", f"{stats.tokens_per_second:.0f} tokens/s"),
        ("queue", seconds(stats.queue_seconds)),
        ("estimation", seconds(stats.estimation_seconds)),
        ("attention", f"{seconds(stats.attention_seconds)} (backend {stats.attention_backend or '-'})"),
        ("other", seconds(stats.other_seconds)),
        ("sparsity", f"{stats.sparsity:.1%} of the causal blocks skipped"),
        ("KV", f"{size(session.size_bytes)}, lease {seconds(session.remaining_lease_seconds)}"),
    ]
    if stats.profile is not None:
        used = stats.profile
        heads = f"{used.sparse_heads} sparse, {used.streaming_heads} streaming, {used.dense_heads} dense heads"
        facts.append(("profile", f"{used.name}, error budget {used.error_budget:g}: {heads}"))
    if stats.guard is not None:
        seen = stats.guard
        alerts = f", {len(seen.alerts)} alerts" if seen.alerts else ""
        facts.append(
            ("guard", f"{seen.num_tiles} tiles, kept mass {seen.kept_mass:.4f}, error {seen.mean_error:.4f}{alerts}")
        )
    best = [f"{entry.token_id} ({entry.logprob:.2f})" for entry in result.top_logits[:5]]
    if best:
        facts.append(("next tokens", ", ".join(best)))
    write_facts(facts)
    if with_layers:
        rows = [(str(index), f"{layer.density:.1%}") for index, layer in enumerate(stats.layers)]
        write_table(("LAYER", "DENSITY"), rows)
