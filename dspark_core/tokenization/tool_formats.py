"""How models write tool calls."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum


class ToolFormat(Enum):
    HERMES = "hermes"
    """JSON between tags, as Hermes and Qwen write it; any number of calls."""
    LLAMA3_JSON = "llama3_json"
    """JSON that is the whole answer, as Llama 3 writes it."""
    MISTRAL = "mistral"
    """For each call a mark, the name and the arguments as JSON, as Mistral's models write it since 2025."""
    MISTRAL_LIST = "mistral_list"
    """One mark and a JSON list of all calls, as earlier Mistral models wrote it."""
    GEMMA4 = "gemma4"
    """`call:name{key:value}` between marks, with marks around strings as well, as Gemma 4 writes it."""
    QWEN3_CODER = "qwen3_coder"
    """The function and each parameter in tags, as Qwen3-Coder writes it; any number of calls."""


class CallShape(Enum):
    """The form of a call between its marks."""

    JSON = "an object with name and arguments"
    NAMED = "the name, then the arguments as JSON"
    BARE_KEYS = "the name, then an object whose keys are not quoted and whose texts are in marks"
    TAGS = "tags with the name of the function, and of each parameter around its value"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    format: ToolFormat
    begin: str
    """Mark before a call."""
    end: str
    shape: CallShape = CallShape.JSON
    opening: str = ""
    """What models write between `begin` and the call."""
    closing: str = ""
    """What models write between the call and `end`."""
    between: str = ""
    """Separator of calls that share one `begin` and `end`; empty: each call has its own."""
    arguments: str = "arguments"
    """Key of the arguments in a JSON call."""
    bare: bool = False
    """Whether a call at the beginning of the answer may lack `begin`."""
    id_mark: str = ""
    """In a named call, the mark before an id that follows the name; empty: there is no id."""
    arguments_mark: str = ""
    """In a named call, the mark before the arguments; empty: none."""
    quote: str = ""
    """Mark around strings, with `CallShape.BARE_KEYS`."""

    @property
    def marks(self) -> frozenset[str]:
        """The marks that may be tokens of their own."""
        marks = (self.begin, self.end, self.id_mark, self.arguments_mark, self.quote)
        return frozenset(mark for mark in marks if mark)

    def written(self, name: str, arguments: str) -> str:
        """The call as the model writes it. arguments: JSON."""
        call = self._call(name, arguments)
        return call if self.bare else f"{self.begin}{self.opening}{call}{self.closing}{self.end}"

    def _call(self, name: str, arguments: str) -> str:
        match self.shape:
            case CallShape.JSON:
                return f'{{"name": {json.dumps(name)}, "{self.arguments}": {arguments}}}'
            case CallShape.NAMED:
                call_id = f"{self.id_mark}call00000" if self.id_mark else ""
                return f"{name}{call_id}{self.arguments_mark}{arguments}"
            case CallShape.BARE_KEYS:
                return f"call:{name}{self._bare_keys(arguments)}"
            case CallShape.TAGS:
                return f"{FUNCTION}{name}>\n{_tagged(arguments)}{FUNCTION_END}"

    def _bare_keys(self, arguments: str) -> str:
        """Arguments that are not JSON stay as they are."""
        try:
            return _with_bare_keys(json.loads(arguments), self.quote)
        except ValueError:
            return arguments


FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
"""Tags of `CallShape.TAGS`."""


def _tagged(arguments: str) -> str:
    """Arguments that are not a JSON object stay as they are."""
    try:
        values = json.loads(arguments)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        return f"{arguments}\n"
    return "".join(f"{PARAMETER}{key}>\n{_untagged(one)}\n{PARAMETER_END}\n" for key, one in values.items())


def _untagged(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_bare_keys(value: object, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return f"[{','.join(_with_bare_keys(one, quote) for one in value)}]"
    if isinstance(value, dict):
        pairs = (f"{_key(name, quote)}:{_with_bare_keys(one, quote)}" for name, one in value.items())
        return f"{{{','.join(pairs)}}}"
    return json.dumps(value)


BARE_KEY = re.compile(r'[^\s:,{}\[\]<>"]+')
"""Keys that `CallShape.BARE_KEYS` writes without quotes."""


def _key(name: str, quote: str) -> str:
    return name if BARE_KEY.fullmatch(name) else f"{quote}{name}{quote}"


SYNTAX = {
    syntax.format: syntax
    for syntax in (
        CallSyntax(
            format=ToolFormat.HERMES, begin="<tool_call>", end="</tool_call>", opening="\n", closing="\n"
        ),
        CallSyntax(
            format=ToolFormat.LLAMA3_JSON, begin="<|python_tag|>", end="", arguments="parameters", bare=True
        ),
        CallSyntax(
            format=ToolFormat.MISTRAL,
            begin="[TOOL_CALLS]",
            end="",
            shape=CallShape.NAMED,
            arguments_mark="[ARGS]",
        ),
        CallSyntax(format=ToolFormat.MISTRAL_LIST, begin="[TOOL_CALLS]", end="]", opening="[", between=", "),
        CallSyntax(
            format=ToolFormat.GEMMA4,
            begin="<|tool_call>",
            end="<tool_call|>",
            shape=CallShape.BARE_KEYS,
            quote='<|"|>',
        ),
        CallSyntax(
            format=ToolFormat.QWEN3_CODER,
            begin="<tool_call>",
            end="</tool_call>",
            shape=CallShape.TAGS,
            opening="\n",
            closing="\n",
        ),
    )
}
