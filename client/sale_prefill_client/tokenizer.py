"""The served model's tokenizer, from its own files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from . import chat_template
from .chat_template import ChatTemplateError, Message
from .detokenizer import IncrementalDecoder
from .extras import require

TOKENIZER_FILE = "tokenizer.json"

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LAST_REPLY = "sale-prefill-last-reply"


class Tokenizer:
    """Text to token ids and back, and chat templates.

    Args:
        folder: directory with `tokenizer.json` and, as far as the model has them, `tokenizer_config.json`,
            `special_tokens_map.json` and `chat_template.jinja`.

    Raises:
        MissingExtraError: the package tokenizers is not installed.
        FileNotFoundError: the folder holds no tokenizer.json.
    """

    def __init__(self, folder: str | Path) -> None:
        tokenizers = require("tokenizers", extra="text", purpose="text in and text out")
        self._folder = Path(folder)
        path = self._folder / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a tokenizer needs it")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._config = {**self._read_json("special_tokens_map.json"), **self._read_json("tokenizer_config.json")}

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens that the model names, such as `eos_token`."""
        found = {}
        for name in _SPECIAL_TOKENS:
            entry = self._config.get(name)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                found[name] = text
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; special tokens written out in it become those tokens.
            add_special_tokens: add what the model wants around a text (such as a begin token). Leave it out for text
                that a chat template made and for text that goes on in a session.

        Raises:
            UnicodeEncodeError: half a surrogate pair, which is no text.
        """
        text.encode()  # tokenizers would call such a string "not a str"
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete characters become U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for ids that come one by one."""
        return IncrementalDecoder(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's (default) chat template; None where it has none."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template if isinstance(template, str) else None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        template = self.chat_template
        if template is None:
            raise ChatTemplateError("the served model has no chat template; send plain text or token ids")
        known = {"tools": None, "documents": None, **self.special_tokens, **variables}
        return chat_template.render(template, messages, add_generation_prompt=add_generation_prompt, variables=known)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = ...,
        tokenize: Literal[False] = ...,
        **variables: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = ...,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """A conversation as the model's chat template writes it.

        Args:
            messages: each with `role` and `content`, oldest first.
            add_generation_prompt: end with the opening of the assistant's answer.
            tokenize: return token ids (without further special tokens: the template wrote them).
            variables: more names for the template, such as `tools`.

        Raises:
            ChatTemplateError: the model has no template, or it refuses the messages.
        """
        text = self._render(messages, add_generation_prompt, variables)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def chat_continuation(
        self,
        messages: Sequence[Message],
        *,
        reply_ended: bool = True,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Text to append to a session that ends with the assistant's answer, for the next turn.

        Rendering the new messages alone would repeat what a template writes at the start (a begin token, a system
        message), so this is what the template adds after an answer of a whole conversation.

        Args:
            messages: the new ones, such as the next question.
            reply_ended: the answer in the session ended with the model's end-of-sequence token
                (`finish_reason == "stop"`); False closes an answer that was cut off.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: more names for the template.

        Raises:
            ChatTemplateError: the model has no template, or it drops earlier answers so that no turn can be appended.
        """
        earlier: list[Message] = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _LAST_REPLY}]
        text = self._render([*earlier, *messages], add_generation_prompt, variables)
        _, marker, continuation = text.partition(_LAST_REPLY)
        if not marker:
            raise ChatTemplateError(
                "the model's chat template rewrites earlier answers, so a turn cannot be appended to a session; "
                "prefill the whole conversation instead"
            )
        end = self.special_tokens.get("eos_token", "")
        return continuation.removeprefix(end) if reply_ended and end else continuation
