"""Finds tool calls in an answer that arrives in pieces.

Whatever is not a call is content, including calls that break off; only whitespace around calls is dropped.
There are two exceptions. Where calls are `eager`, fragments are emitted as they arrive: a call that has begun
stays a call. Where they are `forced`, there is nothing else: what breaks off before its function is known is
dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType

from dspark_core.tokenization.tool_formats import CallSyntax
from services.gateway.marks import suffix_that_begins
from services.gateway.tools.call_translation import Translation, translation
from services.gateway.tools.json_scan import JsonScan
from services.gateway.tools.parameter_kinds import ParameterKinds


@dataclass(frozen=True, slots=True)
class CallDelta:
    index: int
    """Position of the call in its answer."""
    name: str | None
    """The function's name, where a call begins; None: a further fragment of its arguments."""
    arguments: str = ""
    text_before: int = field(default=0, compare=False)
    """How many characters of the content delivered with this delta precede it."""


@dataclass(frozen=True, slots=True)
class Parsed:
    text: str
    """Content."""
    calls: tuple[CallDelta, ...] = ()


NO_KINDS: Mapping[str, ParameterKinds] = MappingProxyType({})


class _Place(Enum):
    TEXT = "text"
    HEAD = "in a call whose function is not known yet"
    ARGUMENTS = "in the arguments of a known function"
    REST = "behind the arguments, before the call's last brace"
    END = "behind a call, where its end mark may come"


class CallStream:
    """Parses one answer. Feed it all of the text, then `flush`."""

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        *,
        eager: bool,
        parallel: bool,
        forced: bool = False,
        kinds: Mapping[str, ParameterKinds] = NO_KINDS,
    ) -> None:
        """kinds: of the functions' parameters, by the functions' names, where a format needs to know them."""
        self._syntax = syntax
        self._names = names
        self._kinds = kinds
        self._eager = eager
        self._forced = forced
        self._parallel = parallel
        self._head = re.compile(rf'\s*\{{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"{syntax.arguments}"\s*:\s*\{{')
        self._place = _Place.TEXT
        self._pending = ""
        """Undecided text; for a call that is not confirmed yet, all of its text."""
        self._json = ""
        """The pending text of a call, translated to JSON."""
        self._space = ""
        """Whitespace and mark before the current call: content if it proves not to be one."""
        self._scan = JsonScan()
        self._translation: Translation = translation(syntax, kinds, first=True)
        self._arguments_at = 0
        self._bare = syntax.bare
        self._count = self._whole = 0
        self._emitted: list[str] = []
        """Fragments of the latest call's arguments that were emitted eagerly."""
        self._broken = False
        """A call that was emitted eagerly proved to be malformed, or one that is forced has no function."""
        self._texts: list[str] = []
        self._calls: list[CallDelta] = []

    @property
    def called(self) -> bool:
        """Whether there are complete calls, and no incomplete one."""
        unfinished = self._broken or self._place in (_Place.HEAD, _Place.ARGUMENTS)
        return self._whole > 0 and not unfinished

    @property
    def done(self) -> bool:
        """Whether the only call allowed is complete."""
        return self.called and not self._parallel

    def push(self, text: str) -> Parsed:
        while text and not self.done:
            match self._place:
                case _Place.TEXT:
                    text = self._look_for_call(text)
                case _Place.END:
                    text = self._look_for_end(text)
                case _:
                    text = self._go_on_with_call(text)
        return self._taken()

    def flush(self) -> Parsed:
        """Returns what was held back, once no more text follows."""
        if self._forced:
            self._drop_head()
        if self._place is _Place.HEAD or (self._place is _Place.ARGUMENTS and not self._eager):
            self._pending = self._no_call()
        if self._place is _Place.TEXT and not (self._count and self._pending.isspace()):
            self._texts.append(self._pending)
        self._pending = ""
        return self._taken()

    def _drop_head(self) -> None:
        begun = self._place is _Place.HEAD or (self._place is _Place.TEXT and self._pending.strip())
        if begun:
            self._place, self._pending, self._broken = _Place.TEXT, "", True

    def _taken(self) -> Parsed:
        parsed = Parsed("".join(self._texts), joined(self._calls))
        self._texts, self._calls = [], []
        return parsed

    def _look_for_call(self, text: str) -> str:
        """Returns the text that remains to be examined."""
        text = self._pending + text
        self._pending = ""
        begin = self._syntax.begin
        start = text.find(begin)
        if self._bare:
            stripped = text.lstrip(_BETWEEN if self._count else None)
            if stripped.startswith("{"):
                return self._begin(text[: len(text) - len(stripped)], stripped)
            if begin.startswith(stripped) and stripped != begin:
                self._pending = text
                return ""
            self._bare = False
        if start >= 0:
            content = text[:start].rstrip()
            self._texts.append(content)
            return self._begin(text[len(content) : start], text[start + len(begin) :], mark=begin)
        content = text[: len(text) - suffix_that_begins(begin, text)].rstrip()
        self._texts.append(content)
        self._pending = text[len(content) :]
        return ""

    def _begin(self, space: str, rest: str, mark: str = "", *, first: bool = True) -> str:
        """first: no earlier call shares its mark."""
        # Where calls need no mark, the mark is a control token, which is never content.
        self._space = space if self._syntax.bare else space + mark
        self._place, self._scan, self._bare = _Place.HEAD, JsonScan(), False
        self._translation, self._json = translation(self._syntax, self._kinds, first=first), ""
        return rest

    def _go_on_with_call(self, text: str) -> str:
        for place, character in enumerate(text):
            written = self._translation.push(character)
            if written is None:
                return self._break_off(text[place:])
            self._pending += character
            for one in written:
                if not self._scan.push(one):
                    self._pending = self._pending[:-1]
                    return self._break_off(text[place:])
                self._json += one
                if self._take(one):
                    return text[place + 1 :]
        if self._eager and self._place is _Place.ARGUMENTS:
            self._emit_arguments()
        return ""

    def _take(self, character: str) -> bool:
        """Takes the next character of a call's JSON. True if the call ends here, or proves not to be one."""
        depth = self._scan.depth
        if self._place is _Place.HEAD:
            if character == "{" and depth == 2:
                self._look_at_head()
            elif character == "}" and depth == 0:
                self._end_of_unknown()
                return True
        elif self._place is _Place.ARGUMENTS:
            return character == "}" and depth == 1 and self._end_of_arguments()
        elif depth == 0:
            self._end()
            return True
        return False

    def _look_at_head(self) -> None:
        match = self._head.fullmatch(self._json)
        if match and match[1] in self._names:
            self._place, self._arguments_at = _Place.ARGUMENTS, len(self._json) - 1
            if self._eager:
                self._add(self._count, match[1])
                self._count += 1
                self._json, self._emitted = self._json[self._arguments_at :], []

    def _emit_arguments(self) -> None:
        self._emitted.append(self._json)
        self._add(self._count - 1, None, self._json)
        self._pending = self._json = ""

    def _add(self, index: int, name: str | None, arguments: str = "") -> None:
        self._calls.append(CallDelta(index, name, arguments, sum(map(len, self._texts))))

    def _end_of_arguments(self) -> bool:
        """Returns whether to stop reading this call: it is not one after all, or no other may follow it."""
        if self._eager:
            self._emit_arguments()
            whole = json_object("".join(self._emitted)) is not None
            self._broken = self._broken or not whole
        else:
            whole = True
            head, arguments = self._json[: self._arguments_at + 1], self._json[self._arguments_at :]
            match = self._head.fullmatch(head)
            if match is None or json_object(arguments) is None:
                self._no_call()
                return True
            self._emit_call(match[1], arguments)
        self._whole += whole
        self._place = _Place.REST
        return self.done

    def _end_of_unknown(self) -> None:
        """Takes a complete object that does not begin as calls usually do, e.g. with its arguments first."""
        call = json_object(self._json) or {}
        name, arguments = call.get("name"), call.get(self._syntax.arguments) or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        if isinstance(name, str) and name in self._names and json_object(text) is not None:
            self._emit_call(name, text)
            self._whole += 1
            self._end()
        else:
            self._no_call()

    def _emit_call(self, name: str, arguments: str) -> None:
        self._add(self._count, name)
        self._add(self._count, None, arguments)
        self._count += 1

    def _break_off(self, rest: str) -> str:
        """The text cannot go on as a call from here."""
        if self._place is _Place.REST:
            self._end()
        elif self._place is _Place.ARGUMENTS and self._eager:
            self._emit_arguments()
            self._place, self._broken = _Place.TEXT, True
        else:
            return self._no_call() + rest
        return rest

    def _no_call(self) -> str:
        """Makes the pending text content. Returns its trailing whitespace, which may precede a real call."""
        text = self._space + self._pending
        content = text.rstrip()
        self._texts.append(content)
        self._place, self._pending = _Place.TEXT, ""
        return text[len(content) :]

    def _end(self) -> None:
        self._place, self._pending = _Place.END, ""

    def _look_for_end(self, text: str) -> str:
        text = self._pending + text
        self._pending = ""
        end, between, stripped = self._syntax.end, self._syntax.between.strip(), text.lstrip()
        if end.startswith(stripped) and stripped != end:
            self._pending = text
            return ""
        if between and stripped.startswith(between):
            space = text[: len(text) - len(stripped)]
            return self._begin(space + between, stripped[len(between) :], first=False)
        self._place, self._bare = _Place.TEXT, self._syntax.bare
        return stripped[len(end) :] if end and stripped.startswith(end) else text


_BETWEEN = " \t\r\n;"
"""Separators between calls without marks."""


def json_object(text: str) -> dict[str, object] | None:
    try:
        text.encode()  # strings from JSON escapes may hold lone surrogates, which cannot be sent
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def joined(calls: Sequence[CallDelta]) -> tuple[CallDelta, ...]:
    """Merges adjacent fragments of the same call's arguments."""
    one: list[CallDelta] = []
    for call in calls:
        last = one[-1] if one else None
        if last is not None and call.name is None and last.name is None and last.index == call.index:
            one[-1] = replace(last, arguments=last.arguments + call.arguments)
        elif call.name is not None or call.arguments:
            one.append(call)
    return tuple(one)
