"""Renders a conversation into the prompt its model was trained on.

Templates come from checkpoints, so they run in Jinja's sandbox and see only messages and tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_core.errors import CheckpointError, ConfigError, InvalidRequestError

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
ARGUMENTS_FIELD = "chat_template_kwargs"
"""The request field for template arguments, named as in other engines."""
_OWN = frozenset({"messages", "tools", "add_generation_prompt"})
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
)
"""Exceptions that templates raise for conversations they do not fit, such as deeply nested ones."""


class _GenerationBlocks(Extension):
    """`{% generation %}` marks text that is trained on; rendering passes its content through."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> None:
        """special_tokens: text by the name templates use, such as `bos_token`. arguments: further
        variables, such as Qwen3's `enable_thinking`; those of a conversation take precedence.

        Raises:
            CheckpointError: the template is not valid Jinja.
            ConfigError: an argument has the name of a variable that every template gets.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlocks],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._arguments = dict(arguments)
        try:
            self._refuse_own(arguments)
        except InvalidRequestError as error:
            raise ConfigError(str(error)) from None
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> str:
        """messages: each with `role` and `content`, and optionally `tool_calls` with arguments as objects
        rather than text. tools: as in OpenAI's API. arguments: further variables, which override those given
        at construction.

        Raises:
            InvalidRequestError: the template refuses the conversation, or an argument has the name of a
                variable that every template gets.
        """
        self._refuse_own(arguments)
        variables = {
            **self._arguments,
            **arguments,
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except _REFUSALS as error:
            raise InvalidRequestError(
                f"messages must fit the model's chat template: {error}", field="messages"
            ) from error

    def _refuse_own(self, arguments: Mapping[str, Any]) -> None:
        for name in arguments:
            if name in _OWN or name in self._special_tokens:
                raise InvalidRequestError(
                    f"{ARGUMENTS_FIELD} cannot set {name!r}, which every chat template is given",
                    field=ARGUMENTS_FIELD,
                )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which would alter the prompt. Same name as in `transformers`."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
