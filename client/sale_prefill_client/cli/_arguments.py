"""Arguments that several commands take, and the client they make."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NamedTuple

from .._sync.client import Client
from ..options import DEFAULT_TARGET, Range, TlsOptions
from ._exit import DESCRIPTION

TARGET_VARIABLE = "SALE_PREFILL_TARGET"
TOKEN_VARIABLE = "SALE_PREFILL_TOKEN"

_DURATION_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Command(NamedTuple):
    """A command as the table of commands lists it."""

    name: str
    summary: str
    example: str


def duration(text: str) -> float:
    """Seconds out of `90`, `90s`, `10m`, `1h`, `500ms` or `1d`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write seconds, or such as 90s, 10m, 1h")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def positive_duration(text: str) -> float:
    """As `duration`, above 0."""
    seconds = duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError("it must be above 0")
    return seconds


def half_open_range(text: str) -> Range:
    """A range out of `START:END`, where either may be left out."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; write START:END, such as 0:1024")
    return int(match[1] or 0), int(match[2]) if match[2] else None


def label(text: str) -> tuple[str, str]:
    """A label out of `KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no label; write KEY=VALUE")
    return key, value


def new_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], command: Command
) -> argparse.ArgumentParser:
    """A command's parser, with its example and the exit codes at the end of its help."""
    return commands.add_parser(
        command.name,
        help=command.summary,
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n  {command.example}\n\n{DESCRIPTION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, as whom, for how long, and `--json`."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="TARGET",
        default=os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET,
        help=f"gRPC target (default ${TARGET_VARIABLE}, else {DEFAULT_TARGET})",
    )
    group.add_argument(
        "--token", help=f"bearer token (default ${TOKEN_VARIABLE}, which other users of this machine cannot see)"
    )
    group.add_argument("--timeout", metavar="DURATION", type=positive_duration, help="for the call, such as 90s or 10m")
    group.add_argument("--tls", action="store_true", help="encrypt, and trust the usual authorities")
    group.add_argument("--tls-ca", metavar="FILE", help="encrypt, and trust this PEM file")
    group.add_argument("--tls-cert", metavar="FILE", help="PEM certificate to show the server")
    group.add_argument("--tls-key", metavar="FILE", help="PEM key of that certificate")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_survival_arguments(parser: argparse._ActionsContainer) -> None:
    """`--durability` and `--pin`: what a session outlives."""
    parser.add_argument(
        "--durability",
        choices=("none", "async", "local", "shared"),
        help="what the KV survives: nothing, a restart soon, a crash once this returns, the loss of the machine",
    )
    parser.add_argument("--pin", choices=("none", "soft", "hard"), help="how the KV stands when memory runs out")


def add_progress_argument(parser: argparse.ArgumentParser) -> None:
    """`--progress`."""
    parser.add_argument(
        "--progress",
        choices=("auto", "always", "never"),
        default="auto",
        help="progress bar on standard error; auto shows it on a terminal",
    )


def wants_progress(arguments: argparse.Namespace) -> bool:
    """Whether to show a bar."""
    return arguments.progress == "always" or (arguments.progress == "auto" and sys.stderr.isatty())


def connect(arguments: argparse.Namespace) -> Client:
    """The client that the arguments describe."""
    wants_tls = arguments.tls or arguments.tls_ca or arguments.tls_cert or arguments.tls_key
    tls = TlsOptions(arguments.tls_ca, arguments.tls_cert, arguments.tls_key) if wants_tls else None
    token = arguments.token or os.environ.get(TOKEN_VARIABLE) or None
    timeout_seconds = 30.0 if arguments.timeout is None else arguments.timeout
    return Client(arguments.server, token=token, tls=tls, default_timeout_seconds=timeout_seconds)
