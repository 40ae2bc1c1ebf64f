"""`sale-prefill push`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import ChecksumMismatchError
from ..kv import KvCache
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
from ._output import plain, size, write_facts, write_json

COMMAND = Command(
    "push",
    "make a session out of a file that pull wrote",
    "sale-prefill push kv.safetensors --session report --lease 10m",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = new_parser(commands, COMMAND)
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", type=Path, help="safetensors file of a whole session")
    parser.add_argument("--session", metavar="ID", help="id of the new session; the server chooses one if left out")
    parser.add_argument("--lease", metavar="DURATION", type=duration, help="how long the session is kept")
    parser.add_argument("--sliding", action="store_true", help="later requests extend the lease")
    add_survival_arguments(parser)
    parser.add_argument("--label", metavar="KEY=VALUE", type=label, action="append", help="label of the session")
    parser.add_argument("--chunk-bytes", metavar="N", type=int, default=1 << 20, help="bytes of a message, about")
    parser.add_argument("--checksum", choices=("crc32c", "xxh3_64", "none"), default="crc32c", help="of each chunk")
    parser.add_argument("--stripes", metavar="N", type=int, default=1, help="connections to send over")
    add_progress_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    try:
        cache = KvCache.load(arguments.file)
    except (OSError, ValueError, ChecksumMismatchError) as error:
        raise _exit.UsageError(str(error)) from error
    started = time.monotonic()
    with connect(arguments) as client:
        session = client.push_kv(
            cache,
            session_id=arguments.session,
            lease_seconds=arguments.lease,
            sliding=arguments.sliding,
            durability=arguments.durability,
            pin=arguments.pin,
            labels=dict(arguments.label or ()),
            chunk_bytes=arguments.chunk_bytes,
            checksum=arguments.checksum,
            stripes=arguments.stripes,
            progress=wants_progress(arguments),
            timeout_seconds=arguments.timeout,
        )
    elapsed_seconds = time.monotonic() - started
    if arguments.json:
        facts = {"num_bytes": cache.num_bytes, "elapsed_seconds": elapsed_seconds}
        write_json({"session": plain(session), **facts})
    else:
        rate = f"{size(cache.num_bytes)} in {elapsed_seconds:.2f} s ({size(cache.num_bytes / elapsed_seconds)}/s)"
        write_facts([("session", session.session_id), ("tokens", str(session.num_tokens)), ("pushed", rate)])
    return _exit.OK
