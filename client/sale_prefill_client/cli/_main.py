"""Parses the command line, runs the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..chat_template import ChatTemplateError
from ..errors import SalePrefillError
from ..extras import MissingExtraError
from . import _decode, _exit, _info, _prefill, _pull, _push, _server_commands, _sessions
from ._arguments import TARGET_VARIABLE, TOKEN_VARIABLE
from ._output import note

_EPILOG = f"""\
example:
  sale-prefill serve &
  sale-prefill info --wait 60s
  sale-prefill prefill report.txt --chat --lease 10m
  sale-prefill decode SESSION

environment:
  {TARGET_VARIABLE}  server, in place of --server
  {TOKEN_VARIABLE}   bearer token, in place of --token

{_exit.DESCRIPTION}"""


def build_parser(asked_for: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        asked_for: the command that will be parsed; the server's commands have no arguments unless it is one of them.
    """
    parser = argparse.ArgumentParser(
        prog="sale-prefill",
        description="Long-context prefill as a service: keeps KV caches by session and decodes from them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (_prefill, _decode, _sessions, _pull, _push, _info):
        command.add(commands)
    _server_commands.add(commands, asked_for)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sale-prefill`.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        int: exit code (see `--help`). Wrong usage that argparse finds exits with 2 by itself.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser(words[0] if words else None).parse_args(words)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _exit.OUTPUT_CLOSED
    except KeyboardInterrupt:
        return _failed("interrupted", _exit.INTERRUPTED)
    except SalePrefillError as error:
        return _failed(_described(error), _exit.code_of(error))
    except _exit.UsageError as error:
        return _failed(str(error), _exit.USAGE)
    except ChatTemplateError as error:
        return _failed(str(error), _exit.INVALID_REQUEST)
    except (MissingExtraError, OSError, ValueError) as error:
        return _failed(str(error), _exit.ERROR)
    return status


def _failed(message: str, status: int) -> int:
    note(f"sale-prefill: {message}")
    return status


def _described(error: SalePrefillError) -> str:
    fields = [violation.field for violation in error.field_violations if violation.field not in error.message]
    where = f" (field {', '.join(fields)})" if fields else ""
    again = "" if error.retry_after_seconds is None else f"; try again in {error.retry_after_seconds:g} s"
    return f"{error}{where}{again}"
