"""Formats in which models write tool calls, and detection of the one a chat template uses.

No model names are needed: a conversation with a call is rendered, and the output reveals the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.chat_template import ChatTemplate


class ToolFormat(Enum):
    HERMES = "hermes"
    """JSON between tags, as in Hermes and Qwen; any number of calls."""
    LLAMA3_JSON = "llama3_json"
    """The whole answer is JSON, as in Llama 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    format: ToolFormat
    begin: str
    """Text before a call."""
    end: str
    arguments: str
    """Key of the call's arguments."""
    bare: bool
    """Whether a call at the very start of the answer may omit `begin`."""

    def written(self, name: str, arguments: str) -> str:
        """The call as its model would write it. arguments: JSON."""
        call = f'{{"name": {json.dumps(name)}, "{self.arguments}": {arguments}}}'
        return call if self.bare else f"{self.begin}\n{call}\n{self.end}"


_SYNTAX = {
    ToolFormat.HERMES: CallSyntax(
        format=ToolFormat.HERMES, begin="<tool_call>", end="</tool_call>", arguments="arguments", bare=False
    ),
    ToolFormat.LLAMA3_JSON: CallSyntax(
        format=ToolFormat.LLAMA3_JSON, begin="<|python_tag|>", end="", arguments="parameters", bare=True
    ),
}


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a template handles tools."""

    syntax: CallSyntax
    native: bool
    """Whether it describes tools to the model itself; otherwise the conversation must (`tool_prompts.py`)."""
    has_system: bool = True
    """Whether it accepts a system message."""


def tool_style(template: ChatTemplate | None, asked: ToolFormat | None = None) -> ToolStyle:
    """asked: a format to use regardless of the template; None: the template's own.

    A template that describes tools but writes calls in none of the known formats is not used for that,
    because its model would answer with calls that cannot be parsed here.
    """
    written = _format_of(template) if template else None
    native = template is not None and _tells_of_tools(template)
    if asked is None:
        native = native and written is not None
    syntax = _SYNTAX[asked or written or ToolFormat.HERMES]
    return ToolStyle(syntax, native, has_system=template is None or _takes_system(template))


_NAME, _SYSTEM = "probe_of_tools", "probe-of-the-system"
_USER = {"role": "user", "content": "?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "?",
        "parameters": {"type": "object", "properties": {"value": {"type": "string"}}},
    },
}
# Some templates require ids of nine letters and digits.
_CALL = {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {"value": "?"}}}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}

_RESULT = {"role": "tool", "tool_call_id": "call00001", "name": _NAME, "content": "?"}


def _tells_of_tools(template: ChatTemplate) -> bool:
    return _NAME in _rendered(template, [_USER], [_TOOL])


def _takes_system(template: ChatTemplate) -> bool:
    return _SYSTEM in _rendered(template, [{"role": "system", "content": _SYSTEM}, _USER])


def _format_of(template: ChatTemplate) -> ToolFormat | None:
    """The format in which the template writes calls; None: none, or an unknown format."""
    # Some templates require that a call is answered, others have no role for the answer.
    text = _rendered(template, [_USER, _CALLING]) + _rendered(template, [_USER, _CALLING, _RESULT])
    for syntax in _SYNTAX.values():
        begin = r"\{" if syntax.bare else rf"{re.escape(syntax.begin)}\s*\{{"
        for match in re.finditer(begin, text):
            call = _json_at(text, match.end() - 1)
            if call.get("name") == _NAME and syntax.arguments in call:
                return syntax.format
    return None


def _json_at(text: str, start: int) -> Mapping[str, Any]:
    """The JSON object at `start`; empty if there is none."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """Empty if the template refuses."""
    try:
        return template.render(messages, tools=tools)
    except InvalidRequestError:
        return ""
