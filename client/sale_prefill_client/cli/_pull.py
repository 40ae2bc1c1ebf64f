"""`sale-prefill pull`."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from . import _exit
from ._arguments import (
    Command,
    add_connection_arguments,
    add_progress_argument,
    connect,
    half_open_range,
    new_parser,
    wants_progress,
)
from ._output import size, write_facts, write_json

COMMAND = Command(
    "pull",
    "copy a session's KV cache to a safetensors file",
    "sale-prefill pull SESSION --output kv.safetensors --layers 0:4",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = new_parser(commands, COMMAND)
    parser.set_defaults(run=run)
    parser.add_argument("session", metavar="SESSION", help="id of the session")
    parser.add_argument("--output", "-o", metavar="FILE", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--token-range", metavar="START:END", type=half_open_range, help="part of the tokens")
    parser.add_argument("--layers", metavar="START:END", type=half_open_range, help="part of the layers")
    parser.add_argument("--layout", choices=("THD", "HTD"), default="THD", help="axis order: tokens or heads first")
    parser.add_argument("--chunk-bytes", metavar="N", type=int, help="bytes of a chunk, about (1 MiB in messages)")
    parser.add_argument("--checksum", choices=("crc32c", "xxh3_64", "none"), help="of each chunk (crc32c in messages)")
    parser.add_argument("--same-host", action="store_true", help="through shared memory, where the server offers it")
    parser.add_argument("--stripes", metavar="N", type=int, default=1, help="connections to read over")
    add_progress_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    started = time.monotonic()
    with connect(arguments) as client:
        cache = client.pull_kv(
            arguments.session,
            token_range=arguments.token_range,
            layer_range=arguments.layers,
            layout=arguments.layout,
            chunk_bytes=arguments.chunk_bytes,
            checksum=arguments.checksum,
            stripes=arguments.stripes,
            transports=("shm",) if arguments.same_host else (),
            progress=wants_progress(arguments),
            timeout_seconds=arguments.timeout,
        )
        cache = replace(cache, attention=client.get_session(arguments.session).attention)
    elapsed_seconds = time.monotonic() - started
    cache.save(arguments.output)
    facts = {
        "session_id": cache.session_id,
        "output": str(arguments.output),
        "tokens": [cache.token_start, cache.token_end],
        "layers": [cache.layer_start, cache.layer_end],
        "layout": cache.spec.layout,
        "element_type": cache.spec.element_type,
        "num_bytes": cache.num_bytes,
        "elapsed_seconds": elapsed_seconds,
        "generation": cache.generation,
        "token_digest": cache.token_digest.hex(),
    }
    if arguments.json:
        write_json(facts)
    else:
        rate = f"{size(cache.num_bytes)} in {elapsed_seconds:.2f} s ({size(cache.num_bytes / elapsed_seconds)}/s)"
        shape = f"{cache.num_tokens} tokens, {cache.layer_end - cache.layer_start} layers, {cache.spec.element_type}"
        write_facts([("file", str(arguments.output)), ("KV", f"{shape}, {cache.spec.layout}"), ("pulled", rate)])
    return _exit.OK
