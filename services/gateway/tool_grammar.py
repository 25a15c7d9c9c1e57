"""What an answer that has to call a tool must be: a grammar of calls as the model writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.tool_formats import CallSyntax
from services.gateway.tools import Tool

MAX_CALLS = 8
"""Of one answer that has to call: a small model may find no end."""


_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models are shown calls. A small one that may choose finds no end of spaces; and what there is no choice
of is drafted for nothing."""


def call_grammar(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    *,
    several: bool,
    is_token: Callable[[str], bool],
    or_else: str | None = None,
) -> Grammar:
    """is_token: whether a text is one added token of the model's. or_else: a JSON schema that the answer may
    keep to instead. Raises InvalidRequestError when they are too large together."""
    choices = " | ".join(f"tool{index}" for index in range(len(tools)))
    start = "calls" if or_else is None else "calls | answer"
    lines = [f"start: {start}", *_calls(syntax, choices, several, is_token)]
    for index, tool in enumerate(tools):
        if syntax.bare and or_else is not None:
            lines.append(f"tool{index}: %json {_as_schema(syntax, tool)}")
        else:
            head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{syntax.arguments}": ')
            # The schema has a rule of its own, and with it a root that its references mean.
            schema = json.dumps({**json.loads(tool.schema), "x-guidance": _SPACING})
            lines += [f'tool{index}: {head} arguments{index} "}}"', f"arguments{index}: %json {schema}"]
    if or_else is not None:
        lines.append(f"answer: %json {or_else}")
    try:
        return Grammar(kind=GrammarKind.LARK, text="\n".join(lines))
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error).replace("grammar", "tools", 1), field="tools") from None


def _as_schema(syntax: CallSyntax, tool: Tool) -> str:
    """Of the whole call: beside other JSON it is JSON to the parser, too, that decides at the first brace."""
    arguments = _moved(json.loads(tool.schema), f"/properties/{syntax.arguments}")
    call = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, syntax.arguments: arguments},
        "required": ["name", syntax.arguments],
        "additionalProperties": False,
    }
    return json.dumps(call)


def _moved(schema: object, place: str) -> object:
    """The schema with its references as they are below `place` of another."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#{place}{reference[1:]}"
    return moved


def _calls(
    syntax: CallSyntax, choices: str, several: bool, is_token: Callable[[str], bool]
) -> tuple[str, ...]:
    if syntax.bare:
        return (f"calls: {choices}",)
    # An added token is no text to the parser: it is named, as it stands in the vocabulary.
    begin, end = (mark if is_token(mark) else json.dumps(mark) for mark in (syntax.begin, syntax.end))
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if several else ""
    return (f"calls: call{more}", f'call: {begin} "\\n" ({choices}) "\\n" {end}')
