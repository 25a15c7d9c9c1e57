"""Grammars of answers with tool calls, in the format in which the model writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.tool_formats import FUNCTION, FUNCTION_END, CallShape, CallSyntax
from services.gateway.json_schemas import moved
from services.gateway.marks import TokenIds, mark_source, token_set
from services.gateway.tools.bare_key_grammar import Texts, rules_of, rules_of_any
from services.gateway.tools.tagged_grammar import tagged_rules
from services.gateway.tools.tools import Tool

MAX_CALLS = 8
"""In an answer that must call: a small model may never stop by itself."""


_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The spacing of the calls that models are shown. Given the choice, a small model may emit spaces for ever;
and forced tokens are drafted for free."""


def call_grammar(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    *,
    several: bool,
    token_id: TokenIds,
    in_text: Sequence[int] = (),
    or_else: str | None = None,
) -> Grammar:
    """Grammar of an answer that must call. in_text: ids of added tokens that may occur in strings. or_else: a
    JSON schema that the answer may satisfy instead. Raises InvalidRequestError if the grammar is too large or
    a schema cannot be enforced."""
    notation = _Notation(syntax, token_id)
    start = "calls" if or_else is None else "calls | answer"
    choices = _choices(tools)
    if syntax.bare:
        calls = [f"calls: {choices}"]
    elif syntax.between:
        more = f" ({json.dumps(syntax.between)} one){{0,{MAX_CALLS - 1}}}" if several else ""
        calls = [f"calls: {notation.begin} {notation.around(f'one{more}')}", f"one: {choices}"]
    else:
        # Calls follow each other directly, or on the next line where marks have lines of their own.
        space = f"{json.dumps(syntax.opening)} " if syntax.opening.isspace() else ""
        more = f" ({space}call){{0,{MAX_CALLS - 1}}}" if several else ""
        calls = [f"calls: call{more}", f"call: {notation.begin} {notation.around(f'({choices})')}"]
    lines = [f"start: {start}", *calls]
    if syntax.bare and or_else is not None:
        lines += [f"tool{index}: %json {_as_schema(syntax, tool)}" for index, tool in enumerate(tools)]
    else:
        lines += _called(notation, tools, in_text, strict=True)
    if or_else is not None:
        lines.append(f"answer: %json {or_else}")
    return _of_tools(lines)


def strict_grammar(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    *,
    several: bool,
    token_id: TokenIds,
    in_text: Sequence[int] = (),
) -> Grammar:
    """Grammar of an answer of free text that may contain calls, but only of these tools, and with arguments
    that satisfy the schemas of strict ones. Otherwise like `call_grammar`."""
    notation = _Notation(syntax, token_id)
    choices = _choices(tools)
    # To the parser an added token is not text: TEXT ends before each one.
    other = [f"other: {token_set(in_text)}"] if in_text else []
    lines = [*other, _ANY_TEXT]
    if syntax.bare:  # a call is the whole answer, recognised by its brace
        lines += [
            f"start: {choices} | SAID" + (" (other TEXT)*" if other else ""),
            r"SAID: /([^{](.|\n)*)?/",
        ]
    else:
        said = "(TEXT other)* " if other else ""
        more = f" ({json.dumps(syntax.between)} one)*" if syntax.between and several else ""
        lines += [
            f"start: ({said}call)* {said}TEXT" if several else f"start: {said}(call | TEXT)",
            f"call: begin {notation.around(f'one{more}')}",
            f"one: {choices}",
            # If the mark is text, the lexeme must end (lazily) at the first one, or TEXT could include it.
            f"begin: TEXT {notation.begin}"
            if notation.is_token(syntax.begin)
            else f"begin[lazy]: TEXT {notation.begin}",
        ]
    return _of_tools([*lines, *_called(notation, tools, in_text, strict=False)])


_ANY_TEXT = r"TEXT: /(.|\n)*/"
_ANY_ARGUMENTS = '{"type": "object"}'


class _Notation:
    """Marks in the grammar's notation. An added token is not text to the parser but is named by its id."""

    def __init__(self, syntax: CallSyntax, token_id: TokenIds) -> None:
        self.syntax = syntax
        self._token_id = token_id

    def is_token(self, text: str) -> bool:
        return self._token_id(text) is not None

    def mark(self, text: str) -> str:
        return mark_source(text, self._token_id(text))

    @property
    def begin(self) -> str:
        return self.mark(self.syntax.begin)

    def around(self, calls: str) -> str:
        """Returns the rule `calls` with everything that surrounds it except `begin`."""
        texts = (json.dumps(text) if text else "" for text in (self.syntax.opening, self.syntax.closing))
        opening, closing = texts
        end = self.mark(self.syntax.end) if self.syntax.end else ""
        return " ".join(part for part in (opening, calls, closing, end) if part)

    @property
    def before_arguments(self) -> str:
        """What a named call has between its name and its arguments."""
        syntax = self.syntax
        call_id = f" {self.mark(syntax.id_mark)} /[a-zA-Z0-9]{{9}}/" if syntax.id_mark else ""
        return call_id + (f" {self.mark(syntax.arguments_mark)}" if syntax.arguments_mark else "")


def _choices(tools: Sequence[Tool]) -> str:
    return " | ".join(f"tool{index}" for index in range(len(tools)))


def _called(notation: _Notation, tools: Sequence[Tool], in_text: Sequence[int], *, strict: bool) -> list[str]:
    """The rules of the tools. strict: treat every tool as strict."""
    if notation.syntax.shape is CallShape.BARE_KEYS:
        return _called_with_bare_keys(notation, tools, in_text, strict=strict)
    if notation.syntax.shape is CallShape.TAGS:
        return _called_with_tags(tools, strict=strict)
    lines = []
    for index, tool in enumerate(tools):
        # The schema gets a rule of its own, and thereby the root that its references need.
        schema = json.loads(tool.schema if strict or tool.strict else _ANY_ARGUMENTS)
        spaced = json.dumps({**schema, "x-guidance": _SPACING}, ensure_ascii=False)
        if notation.syntax.shape is CallShape.NAMED:
            call = f"{json.dumps(tool.name)}{notation.before_arguments} arguments{index}"
        else:
            head = f'{{"name": {json.dumps(tool.name)}, "{notation.syntax.arguments}": '
            call = f'{json.dumps(head)} arguments{index} "}}"'
        lines += [f"tool{index}: {call}", f"arguments{index}: %json {spaced}"]
    return lines


def _called_with_bare_keys(
    notation: _Notation, tools: Sequence[Tool], in_text: Sequence[int], *, strict: bool
) -> list[str]:
    quote = notation.syntax.quote
    words = f"(WORDS {token_set(in_text)})* WORDS" if in_text else "WORDS"
    texts = Texts(notation.mark(quote), "words", notation.is_token(quote))
    lines = [f"words: {words}", _ANY_TEXT.replace("TEXT", "WORDS"), *rules_of_any(texts)]
    for index, tool in enumerate(tools):
        lines.append(f"tool{index}: {json.dumps(f'call:{tool.name}')} arguments{index}")
        schema = json.loads(tool.schema if strict or tool.strict else _ANY_ARGUMENTS)
        lines += rules_of(f"arguments{index}", schema, texts, f"{tool.place}.parameters")
    return lines


def _called_with_tags(tools: Sequence[Tool], *, strict: bool) -> list[str]:
    lines = []
    for index, tool in enumerate(tools):
        head = json.dumps(f"{FUNCTION}{tool.name}>\n")
        lines.append(f"tool{index}: {head} arguments{index} {json.dumps(FUNCTION_END)}")
        schema = json.loads(tool.schema if strict or tool.strict else _ANY_ARGUMENTS)
        lines += tagged_rules(f"arguments{index}", schema, _SPACING, f"{tool.place}.parameters")
    return lines


def _of_tools(lines: Sequence[str]) -> Grammar:
    try:
        return Grammar(kind=GrammarKind.LARK, text="\n".join(lines))
    except InvalidRequestError as error:
        raise error.about("tools") from None


def _as_schema(syntax: CallSyntax, tool: Tool) -> str:
    """JSON schema of the whole call. If the alternative is a JSON answer, the call must be a JSON rule too,
    because the parser chooses between them at the first brace."""
    arguments = moved(json.loads(tool.schema), f"/properties/{syntax.arguments}")
    call = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, syntax.arguments: arguments},
        "required": ["name", syntax.arguments],
        "additionalProperties": False,
    }
    return json.dumps(call, ensure_ascii=False)
