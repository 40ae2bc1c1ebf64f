"""`sale-prefill decode`."""

from __future__ import annotations

import argparse

from .._arguments import DecodeArguments
from .._sync.client import Client
from ..options import Sampling
from ..results import DecodedToken, DecodeResult
from . import _exit
from ._arguments import (
    Command,
    add_connection_arguments,
    add_progress_argument,
    connect,
    new_parser,
    wants_progress,
)
from ._exit import UsageError
from ._output import note, plain, write, write_json
from ._prompt import add_prompt_arguments, conversation, prompt_token_ids, read_prompt

COMMAND = Command(
    "decode",
    "continue a session, after appending a prompt where one is given",
    'sale-prefill decode SESSION --prompt "And in one sentence?" --chat --max-new-tokens 64',
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = new_parser(commands, COMMAND)
    parser.set_defaults(run=run)
    parser.add_argument("session", metavar="SESSION", help="id of the session")
    add_prompt_arguments(parser, chat_help="append the prompt as the next user's message of the session's chat")
    parser.add_argument("--close-answer", action="store_true", help="with --chat: the last answer was cut off; end it")
    group = parser.add_argument_group("answer")
    group.add_argument("--max-new-tokens", "-n", metavar="N", type=int, default=256, help="limit (default %(default)s)")
    group.add_argument("--stop-token", metavar="ID", type=int, action="append", help="token id that ends the answer")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end-of-sequence tokens")
    group.add_argument("--logprobs", metavar="N", type=int, default=0, help="alternatives to each token (with --json)")
    group = parser.add_argument_group("sampling (greedy where left out)")
    group.add_argument("--temperature", metavar="T", type=float, default=0.0)
    group.add_argument("--top-k", metavar="K", type=int, default=0)
    group.add_argument("--top-p", metavar="P", type=float)
    group.add_argument("--min-p", metavar="P", type=float, default=0.0)
    group.add_argument("--repetition-penalty", metavar="X", type=float)
    group.add_argument("--seed", metavar="N", type=int)
    parser.add_argument("--request-id", metavar="ID", help="idempotency key: a repeat gets the same tokens")
    parser.add_argument("--expect-prefix", metavar="N", type=int, help="tokens that the session must hold already")
    add_progress_argument(parser)
    add_connection_arguments(parser)


def _decode_arguments(arguments: argparse.Namespace) -> DecodeArguments:
    return {
        "progress": wants_progress(arguments),
        "timeout_seconds": arguments.timeout,
        "max_new_tokens": arguments.max_new_tokens,
        "stop_token_ids": arguments.stop_token or (),
        "ignore_eos": arguments.ignore_eos,
        "num_top_logprobs": arguments.logprobs,
        "request_id": arguments.request_id,
        "expected_prefix_tokens": arguments.expect_prefix,
        "sampling": Sampling(
            repetition_penalty=arguments.repetition_penalty,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            seed=arguments.seed,
        ),
    }


def _appended_ids(arguments: argparse.Namespace, client: Client) -> list[int]:
    prompt = read_prompt(arguments)
    if prompt is None:
        if arguments.chat or arguments.close_answer:
            raise UsageError("--chat and --close-answer need a prompt: a file, - for standard input, or --prompt TEXT")
        return []
    if arguments.tokens:
        return prompt_token_ids(prompt)
    tokenizer = client.tokenizer()
    if arguments.chat:
        prompt = tokenizer.chat_continuation(conversation(prompt, None), reply_ended=not arguments.close_answer)
    return tokenizer.encode(prompt, add_special_tokens=False)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with connect(arguments) as client:
        token_ids = _appended_ids(arguments, client)
        decoder = None if arguments.tokens else client.tokenizer().stream_decoder()
        tokens: list[DecodedToken] = []
        pieces: list[str] = []

        def emit(piece: str) -> None:
            pieces.append(piece)
            if not arguments.json:
                write(piece)

        with client.decode(arguments.session, token_ids, **_decode_arguments(arguments)) as stream:
            for token in stream:
                tokens.append(token)
                emit(f"{token.token_id} " if decoder is None else decoder.push(token.token_id))
        emit("" if decoder is None else decoder.flush())
    result = stream.result
    if result is None:
        raise RuntimeError("the decode ended without a result")
    if arguments.json:
        text = None if decoder is None else "".join(pieces)
        ids = [token.token_id for token in tokens]
        write_json({"text": text, "token_ids": ids, "tokens": tokens, **plain(result)})
    else:
        write("\n")
        _summary(result)
    return _exit.OK


def _summary(result: DecodeResult) -> None:
    stats = result.stats
    rate = f"{stats.decoded_tokens / stats.decode_seconds:.1f} tokens/s" if stats.decode_seconds else "-"
    appended = "" if stats.prefill is None else f"; {stats.prefill.computed_tokens} tokens prefilled before"
    note(f"[{stats.decoded_tokens} tokens, {rate}, ended by {result.finish_reason}{appended}]")
