"""`sale-prefill serve` and `sale-prefill models`: in the server's package, and loaded only when asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from ..extras import needing, require
from ._arguments import Command, new_parser

_SERVER_MODULE = "sale_prefill_server.cli"

COMMANDS = (
    Command("serve", "run a server", "sale-prefill serve --model ./my-model --port 50051"),
    Command("models", "list, fetch or remove models of the server", "sale-prefill models list"),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser], asked_for: str | None) -> None:
    """Add both commands; the one asked for gets its arguments from the server's package.

    Args:
        commands: the table of commands.
        asked_for: the command on the command line.

    Raises:
        MissingExtraError: it needs packages that are not installed.
    """
    for command in COMMANDS:
        parser = new_parser(commands, command)
        if command.name == asked_for:
            server = require(_SERVER_MODULE, extra="server", purpose=f"`sale-prefill {command.name}`")
            getattr(server, f"add_{command.name}_arguments")(parser)
            parser.set_defaults(run=_runner(command.name))


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        with needing("server", f"`sale-prefill {name}`"):
            server = importlib.import_module(_SERVER_MODULE)
            status: int = getattr(server, f"run_{name}")(arguments)
        return status

    return run
