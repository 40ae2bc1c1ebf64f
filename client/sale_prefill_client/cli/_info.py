"""`sale-prefill info`."""

from __future__ import annotations

import argparse

from ..errors import NotImplementedByServerError
from ..results import Load, ServerInfo
from . import _exit
from ._arguments import Command, add_connection_arguments, connect, new_parser, positive_duration
from ._output import plain, seconds, size, write_facts, write_json

COMMAND = Command(
    "info",
    "show the server's model, limits and load",
    "sale-prefill info --wait 60s",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = new_parser(commands, COMMAND)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--wait", metavar="DURATION", type=positive_duration, help="wait until the server is ready, this long at most"
    )
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with connect(arguments) as client:
        if arguments.wait is not None:
            client.wait_until_ready(arguments.wait)
        info = client.get_server_info()
        try:
            load = client.get_load()
        except NotImplementedByServerError:
            load = None
    if arguments.json:
        write_json(plain(info) | {"load": load})
    else:
        write_facts(_facts(info) + ([] if load is None else _load_facts(load)))
    return _exit.OK


def _facts(info: ServerInfo) -> list[tuple[str, str]]:
    facts = [
        ("server", f"{info.server_id}, version {info.server_version}"),
        ("model", info.model_name),
        ("device", f"{info.device}, attention backend {info.attention_backend}"),
        ("context", f"{info.max_sequence_tokens} tokens"),
        ("vocabulary", f"{info.vocabulary_size} tokens, end of sequence {', '.join(map(str, info.eos_token_ids))}"),
        ("attention", f"{info.default_attention.mode} where a request names none"),
        ("profile", _profile(info)),
        ("lease", f"{seconds(info.default_lease_seconds)} where a request names none"),
        ("messages", f"up to {size(info.max_message_bytes)}"),
    ]
    if info.kv_spec is not None:
        spec = info.kv_spec
        shape = f"{spec.num_layers} layers x {spec.num_kv_heads} heads x {spec.head_dim}, {spec.element_type}"
        facts.append(("KV", f"{shape}: {size(2 * spec.num_layers * spec.layer_token_bytes)} a token"))
    return facts


def _profile(info: ServerInfo) -> str:
    if info.profile is None:
        return "none"
    budgets = ", ".join(f"{budget:g}" for budget in info.profile.error_budgets)
    return f"{info.profile.name} ({info.profile.digest[:12]}), error budgets {budgets}"


def _load_facts(load: Load) -> list[tuple[str, str]]:
    return [
        ("requests", f"{load.running_requests} running, {load.queued_requests} waiting ({load.queued_tokens} tokens)"),
        ("speed", f"{load.prefill_tokens_per_second:.0f} tokens/s"),
        ("KV memory", f"{size(load.kv_used_bytes)} of {size(load.kv_capacity_bytes)}, {load.sessions} sessions"),
    ]
