"""`sale-prefill serve`, `models`, `calibrate`, `evaluate`: in the server's packages, loaded only when asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from ..extras import needing, require
from ._arguments import Command, new_parser

#: Where a command is, if not with the server's own.
_SERVER_MODULE = "sale_prefill_server.cli"
_MODULES = {"calibrate": "sale_fidelity.cli", "evaluate": "sale_fidelity.evaluation.command"}

COMMANDS = (
    Command("serve", "run a server", "sale-prefill serve --model ./my-model --port 50051"),
    Command("models", "list, fetch or remove models of the server", "sale-prefill models list"),
    Command(
        "calibrate", "find what each head of a model may skip", "sale-prefill calibrate ./my-model --output p.json"
    ),
    Command(
        "evaluate", "measure what SALE changes in a model's answers", "sale-prefill evaluate ./my-model --items 20"
    ),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser], asked_for: str | None) -> None:
    """Add these commands; the one asked for gets its arguments from the server's package.

    Args:
        commands: the table of commands.
        asked_for: the command on the command line.

    Raises:
        MissingExtraError: it needs packages that are not installed.
    """
    for command in COMMANDS:
        parser = new_parser(commands, command)
        if command.name == asked_for:
            server = require(_module(command.name), extra="server", purpose=f"`sale-prefill {command.name}`")
            getattr(server, f"add_{command.name}_arguments")(parser)
            parser.set_defaults(run=_runner(command.name))


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        with needing("server", f"`sale-prefill {name}`"):
            server = importlib.import_module(_module(name))
            status: int = getattr(server, f"run_{name}")(arguments)
        return status

    return run


def _module(name: str) -> str:
    return _MODULES.get(name, _SERVER_MODULE)
