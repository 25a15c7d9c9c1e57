"""What an answer that calls a tool must be: a grammar of calls as the model writes them."""

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
            lines += _called(syntax, index, tool, tool.schema)
    if or_else is not None:
        lines.append(f"answer: %json {or_else}")
    return _of_tools(lines)


def strict_grammar(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    *,
    several: bool,
    is_token: Callable[[str], bool],
    in_text: Sequence[int] = (),
) -> Grammar:
    """Of an answer that may be any text, with calls in it that keep to the schemas of strict tools.

    in_text: added tokens that may stand in the text; the rest as of `call_grammar`.
    """
    choices = " | ".join(f"tool{index}" for index in range(len(tools)))
    # To the parser added tokens are no text, which ends before each.
    other = [f"other: <[{','.join(map(str, in_text))}]>"] if in_text else []
    lines = [*other, r"TEXT: /(.|\n)*/"]
    if syntax.bare:  # a call is the whole answer, and known by its brace
        lines += [
            f"start: {choices} | SAID" + (" (other TEXT)*" if other else ""),
            r"SAID: /([^{](.|\n)*)?/",
        ]
    else:
        begin, end = (mark if is_token(mark) else json.dumps(mark) for mark in (syntax.begin, syntax.end))
        said = "(TEXT other)* " if other else ""
        lines += [
            f"start: ({said}call)* {said}TEXT" if several else f"start: {said}(call | TEXT)",
            f'call: begin "\\n" ({choices}) "\\n" {end}',
            # A mark that is text has to end its lexeme as soon as it is there, or it could go on as text.
            f"begin: TEXT {begin}" if is_token(syntax.begin) else f"begin[lazy]: TEXT {begin}",
        ]
    for index, tool in enumerate(tools):
        lines += _called(syntax, index, tool, tool.schema if tool.strict else _ANY_ARGUMENTS)
    return _of_tools(lines)


_ANY_ARGUMENTS = '{"type": "object"}'


def _called(syntax: CallSyntax, index: int, tool: Tool, schema: str) -> tuple[str, str]:
    head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{syntax.arguments}": ')
    # The schema has a rule of its own, and with it a root that its references mean.
    spaced = json.dumps({**json.loads(schema), "x-guidance": _SPACING}, ensure_ascii=False)
    return f'tool{index}: {head} arguments{index} "}}"', f"arguments{index}: %json {spaced}"


def _of_tools(lines: Sequence[str]) -> Grammar:
    try:
        return Grammar(kind=GrammarKind.LARK, text="\n".join(lines))
    except InvalidRequestError as error:
        raise error.about("tools") from None


def _as_schema(syntax: CallSyntax, tool: Tool) -> str:
    """Of the whole call: beside other JSON it is JSON to the parser, too, that decides at the first brace."""
    arguments = _moved(json.loads(tool.schema), f"/properties/{syntax.arguments}")
    call = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, syntax.arguments: arguments},
        "required": ["name", syntax.arguments],
        "additionalProperties": False,
    }
    return json.dumps(call, ensure_ascii=False)


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
