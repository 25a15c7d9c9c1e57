"""Translates tool calls as models write them into JSON with `name` and arguments, character by character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Protocol

from dspark_core.tokenization.tool_formats import (
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    CallShape,
    CallSyntax,
)
from services.gateway.marks import suffix_that_begins
from services.gateway.tools.json_scan import JsonScan
from services.gateway.tools.parameter_kinds import ParameterKind, ParameterKinds

_MOST_BEFORE_ARGUMENTS = 160
"""Characters that a name and an id may take together."""
_NAME = "[a-zA-Z0-9_-]{1,64}"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}


class Translation(Protocol):
    """Translates one call."""

    def push(self, character: str) -> str | None:
        """Returns the JSON that the character adds, if any; None: it cannot occur here."""


def translation(syntax: CallSyntax, kinds: Mapping[str, ParameterKinds], *, first: bool) -> Translation:
    """kinds: of the functions, by name. first: no earlier call shares its `begin`."""
    match syntax.shape:
        case CallShape.JSON:
            return _Json(syntax.opening.strip() if first else "")
        case CallShape.NAMED:
            return _NamedJson(syntax)
        case CallShape.BARE_KEYS:
            return _BareKeys(syntax)
        case CallShape.TAGS:
            return _Tagged(kinds)


class _Json:
    """The call is JSON already, after the opening of a list where there is one; small models forget that."""

    def __init__(self, opening: str) -> None:
        self._opening = opening

    def push(self, character: str) -> str:
        if self._opening and not character.isspace():
            opening, self._opening = self._opening, ""
            return "" if character == opening else character
        return character


class _NamedJson:
    def __init__(self, syntax: CallSyntax) -> None:
        call_id = rf"(?:{re.escape(syntax.id_mark)}\s*\w*\s*)?" if syntax.id_mark else ""
        mark = f"(?:{re.escape(syntax.arguments_mark)})?" if syntax.arguments_mark else ""
        self._before_arguments = re.compile(rf"\s*({_NAME})\s*{call_id}{mark}\s*")
        self._head = ""
        self._arguments: JsonScan | None = None

    def push(self, character: str) -> str | None:
        if self._arguments is None:
            return self._push_before_arguments(character)
        if not self._arguments.push(character):
            return None
        return character if self._arguments.depth else character + "}"

    def _push_before_arguments(self, character: str) -> str | None:
        if character != "{":
            self._head += character
            return "" if len(self._head) <= _MOST_BEFORE_ARGUMENTS else None
        match = self._before_arguments.fullmatch(self._head)
        if match is None:
            return None
        self._arguments = JsonScan()
        self._arguments.push(character)
        return _head_of(match[1]) + character


class _BareKeys:
    """`call:name{key:value}`: keys without quotes, strings between marks and without escapes."""

    def __init__(self, syntax: CallSyntax) -> None:
        self._quote = syntax.quote
        self._held = ""
        """Part of an incomplete name, key or value, or of a mark that may end a string."""
        self._closing: list[str] = []
        """Closing brackets of the open objects and lists."""
        self._next: Callable[[str], str | None] = self._in_name
        self._escaped = False

    def push(self, character: str) -> str | None:
        return self._next(character)

    def _in_name(self, character: str) -> str | None:
        if character != "{":
            self._held += character
            return "" if len(self._held) <= _MOST_BEFORE_ARGUMENTS else None
        match = re.fullmatch(rf"\s*call:\s*({_NAME})\s*", self._held)
        return _head_of(match[1]) + self._opened("{") if match else None

    def _opened(self, bracket: str) -> str:
        self._closing.append("}" if bracket == "{" else "]")
        self._held, self._next = "", self._at_beginning
        return bracket

    def _at_beginning(self, character: str) -> str | None:
        """At the beginning of an object or list, which may be empty."""
        if character == self._closing[-1]:
            return self._closed()
        return self._before_one(character)

    def _before_one(self, character: str) -> str | None:
        if character.isspace():
            return ""
        self._next = self._in_key if self._closing[-1] == "}" else self._before_value
        return self._next(character)

    def _in_key(self, character: str) -> str | None:
        quoted = self._held.startswith(self._quote) and self._held.count(self._quote) < 2
        if quoted or character not in ":,{}[]":
            self._held += character
            return ""
        if character != ":":
            return None
        key = self._held.strip().removeprefix(self._quote).removesuffix(self._quote)
        self._held, self._next = "", self._before_value
        return f"{_text(key)}: "

    def _before_value(self, character: str) -> str | None:
        if character.isspace():
            return ""
        if character in "{[":
            return self._opened(character)
        self._next = self._in_json_text if character == '"' else self._in_value
        return character if character == '"' else self._in_value(character)

    def _in_value(self, character: str) -> str | None:
        if character in ",}]":
            word = self._held.strip()
            self._held = ""
            written = self._after_value(character)
            return None if not word or written is None else _word(word) + written
        self._held += character
        if self._held != self._quote:
            return ""
        self._held, self._next = "", self._in_text
        return '"'

    def _in_text(self, character: str) -> str:
        self._held += character
        if self._held.endswith(self._quote):
            text = self._held.removesuffix(self._quote)
            self._held, self._next = "", self._after_value
            return f'{_text(text)[1:-1]}"'
        held = suffix_that_begins(self._quote, self._held)
        certain = self._held[: len(self._held) - held]
        self._held = self._held[len(certain) :]
        return _text(certain)[1:-1]

    def _in_json_text(self, character: str) -> str:
        """A string in JSON's notation: the model forgot its marks, or the grammar demanded JSON."""
        if character == '"' and not self._escaped:
            self._next = self._after_value
        self._escaped = character == "\\" and not self._escaped
        return character

    def _after_value(self, character: str) -> str | None:
        if character.isspace():
            self._next = self._after_value
            return ""
        if character == ",":
            self._next = self._before_one
            return ", "
        return self._closed() if character == self._closing[-1] else None

    def _closed(self) -> str:
        bracket = self._closing.pop()
        self._next = self._after_value
        return bracket if self._closing else bracket + "}"


class _Tagged:
    """`<function=name>`, then each value after `<parameter=key>`: a text without quotes, or JSON."""

    _BEFORE_END = "\n"
    """Belongs to the tags, as does the line break before a value."""

    def __init__(self, kinds: Mapping[str, ParameterKinds]) -> None:
        self._kinds = kinds
        self._function = ParameterKinds()
        self._kind = ParameterKind()
        self._held = ""
        """Part of a tag, or of a value that may end here or whose kind is known at its end only."""
        self._any_yet = False
        self._next: Callable[[str], str | None] = self._in_head
        self._at_beginning = True

    def push(self, character: str) -> str | None:
        return self._next(character)

    def _in_head(self, character: str) -> str | None:
        tag = self._tag(character)
        if not tag:
            return tag
        match = re.fullmatch(rf"{FUNCTION}({_NAME})>", tag)
        if match is None:
            return None
        self._function = self._kinds.get(match[1], self._function)
        self._next = self._between
        return _head_of(match[1]) + "{"

    def _tag(self, character: str) -> str | None:
        """The tag if this ends it, empty if it goes on; None: here is none."""
        if not self._held and character.isspace():
            return ""
        self._held += character
        if self._held[0] != "<" or len(self._held) > _MOST_BEFORE_ARGUMENTS:
            return None
        if character != ">":
            return ""
        tag, self._held = self._held, ""
        return tag

    def _between(self, character: str) -> str | None:
        tag = self._tag(character)
        if not tag:
            return tag
        if tag == FUNCTION_END:
            return "}}"
        key = tag.removeprefix(PARAMETER).removesuffix(">")
        if not tag.startswith(PARAMETER) or not key:
            return None
        comma, self._any_yet = ", " if self._any_yet else "", True
        self._kind = self._function.of(key)
        self._next, self._at_beginning = self._in_value, True
        return f"{comma}{_text(key)}: " + ('"' if self._kind.streams else "")

    def _in_value(self, character: str) -> str:
        at_beginning, self._at_beginning = self._at_beginning, False
        if at_beginning and character == "\n":
            return ""
        self._held += character
        if self._held.endswith(PARAMETER_END):
            value = self._held.removesuffix(PARAMETER_END).removesuffix(self._BEFORE_END)
            self._held, self._next = "", self._between
            return f'{_text(value)[1:-1]}"' if self._kind.streams else self._kind.json_of(value)
        if not self._kind.streams:
            return ""
        held = max(suffix_that_begins(mark + PARAMETER_END, self._held) for mark in ("", self._BEFORE_END))
        certain = self._held[: len(self._held) - held]
        self._held = self._held[len(certain) :]
        return _text(certain)[1:-1]


def _head_of(name: str) -> str:
    return f'{{"name": "{name}", "arguments": '


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _word(word: str) -> str:
    """Anything but a number or one of JSON's words is a string whose marks were forgotten."""
    return _WORDS.get(word) or (word if _NUMBER.fullmatch(word) else _text(word))
