"""Chat templates as Hugging Face tokenizers carry them: Jinja, rendered in a sandbox because a server supplies them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .extras import require

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """The model has no chat template, or the template refuses these messages."""


def _environment() -> Any:
    """The environment that published templates expect: block trimming, loop controls, `{% generation %}`, a `tojson`
    that keeps non-ASCII text, `raise_exception` and `strftime_now`."""
    require("jinja2", extra="text", purpose="a chat template")
    from jinja2 import ext, nodes, sandbox

    class GenerationBlocks(ext.Extension):
        """Renders the inside of `{% generation %}...{% endgeneration %}`, which marks text for training."""

        tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def raise_exception(message: str) -> None:
        raise ChatTemplateError(f"the model's chat template refuses these messages: {message}")

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, GenerationBlocks]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def render(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: each with `role` and `content`, oldest first.
        add_generation_prompt: end with the opening of the assistant's answer.
        variables: more names for the template, such as `bos_token`, `tools`.

    Raises:
        ChatTemplateError: the template refuses the messages or is broken.
        MissingExtraError: jinja2 is not installed.
    """
    environment = _environment()
    from jinja2 import TemplateError

    try:
        compiled = environment.from_string(template)
        text: str = compiled.render(
            **variables, messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ChatTemplateError(f"the model's chat template failed: {type(error).__name__}: {error}") from error
    return text
