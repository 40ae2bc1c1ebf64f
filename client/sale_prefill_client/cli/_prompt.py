"""The prompt of a command: text or token ids, from a file, an argument or standard input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .._sync.client import Client
from ..chat_template import Message
from ..tokens import parse_token_ids
from ._exit import UsageError


def add_prompt_arguments(parser: argparse.ArgumentParser, *, chat_help: str) -> None:
    """`INPUT`, `--prompt`, `--tokens`, `--chat`."""
    group = parser.add_argument_group("input")
    group.add_argument("input", metavar="INPUT", nargs="?", help="file with the prompt; - reads standard input")
    group.add_argument("--prompt", metavar="TEXT", help="the prompt itself, in place of a file")
    group.add_argument(
        "--tokens",
        action="store_true",
        help="token ids in place of text: the prompt (apart by white space or commas, or a JSON list) and the answer",
    )
    group.add_argument("--chat", action="store_true", help=chat_help)


def read_prompt(arguments: argparse.Namespace) -> str | None:
    """What the arguments name; None where they name nothing.

    Raises:
        UsageError: two prompts, flags that exclude each other, or a file that cannot be read.
    """
    if arguments.input is not None and arguments.prompt is not None:
        raise UsageError("both an input file and --prompt were given; use one of them")
    if arguments.chat and arguments.tokens:
        raise UsageError("--chat writes text for the model and --tokens sends ids as they are; use one of them")
    if arguments.input is None:
        prompt: str | None = arguments.prompt
        return prompt
    try:
        raw = sys.stdin.buffer.read() if arguments.input == "-" else Path(arguments.input).read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {arguments.input} as UTF-8 text: {error}") from error


def prompt_token_ids(prompt: str) -> list[int]:
    """Token ids of a `--tokens` prompt; UsageError where they are none."""
    try:
        return parse_token_ids(prompt)
    except ValueError as error:
        raise UsageError(f"--tokens: {error}") from error


def conversation(prompt: str, system: str | None) -> list[Message]:
    """The prompt as the user's message, after a system message where there is one."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def chat_token_ids(client: Client, prompt: str, system: str | None) -> list[int]:
    """Token ids of a new conversation that opens with the prompt."""
    return client.tokenizer().apply_chat_template(conversation(prompt, system), tokenize=True)
