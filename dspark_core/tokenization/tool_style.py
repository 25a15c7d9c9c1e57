"""Finds out how a chat template has its model write tool calls, and what else it requires for them.

Model names play no part: the template renders a sample conversation with a call, and the result shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.chat_template import ChatTemplate
from dspark_core.tokenization.tool_formats import SYNTAX, CallShape, CallSyntax, ToolFormat


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a template handles tools."""

    syntax: CallSyntax
    native: bool
    """The template describes tools to the model; otherwise messages must do so (`tool_prompts.py`)."""
    has_system: bool = True
    """The template accepts a system message."""
    short_ids: bool = False
    """The template only accepts call ids of nine letters and digits."""
    results_in_calls: bool = False
    """The template writes results only as part of the message that has the calls."""


def tool_style(template: ChatTemplate | None, asked: ToolFormat | None = None) -> ToolStyle:
    """asked: a format to use regardless of the template; None: the template's.

    A template that describes tools but writes calls in an unknown format is not given the tools: its model
    would answer with calls that cannot be parsed.
    """
    if template is None:
        return ToolStyle(SYNTAX[asked or ToolFormat.HERMES], native=False)
    written = _written_by(template)
    if asked is not None and (written is None or written.format is not asked):
        syntax, native = SYNTAX[asked], _renders_tools(template)
    else:
        syntax = written or SYNTAX[ToolFormat.HERMES]
        native = written is not None and _renders_tools(template)
    return ToolStyle(
        syntax,
        native,
        has_system=_renders_system(template),
        short_ids=_takes_call(template, _SHORT_ID) and not all(_takes_call(template, one) for one in _IDS),
        results_in_calls=_wants_results_in_calls(template),
    )


_NAME, _SYSTEM, _VALUE, _OUTPUT = "probe_of_tools", "probe-of-the-system", "of-a-call", "of-a-result"
_SHORT_ID, _IDS = "call00001", ("c1", "call_0123456789abcdef")
_USER = {"role": "user", "content": "?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "?",
        "parameters": {"type": "object", "properties": {"value": {"type": "string"}}},
    },
}


def _calling(call_id: str = _SHORT_ID) -> dict[str, Any]:
    function = {"name": _NAME, "arguments": {"value": _VALUE}}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _result(call_id: str = _SHORT_ID) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": _NAME, "content": _OUTPUT}


def _renders_tools(template: ChatTemplate) -> bool:
    return _NAME in _rendered(template, [_USER], [_TOOL])


def _renders_system(template: ChatTemplate) -> bool:
    return _SYSTEM in _rendered(template, [{"role": "system", "content": _SYSTEM}, _USER])


def _takes_call(template: ChatTemplate, call_id: str) -> bool:
    return bool(_rendered(template, [_USER, _calling(call_id), _result(call_id)]))


def _wants_results_in_calls(template: ChatTemplate) -> bool:
    """Such templates write a message of role `tool` like any other, without a function name, if at all."""
    calling = {**_calling(), RESULTS_FIELD: [{"name": _NAME, "response": _OUTPUT}]}
    return (
        _OUTPUT in _rendered(template, [_USER, calling])
        and _rendered(template, [_USER, _calling(), _result()]).count(_NAME) < 2
    )


RESULTS_FIELD = "tool_responses"
"""Field of a message with calls in which some templates expect the results."""


def _written_by(template: ChatTemplate) -> CallSyntax | None:
    """How the template writes calls; None: not at all, or in an unknown format."""
    # Some templates require a result after each call, others have no role for results.
    text = _rendered(template, [_USER, _calling()]) + _rendered(template, [_USER, _calling(), _result()])
    found = (_as_written(syntax, text) for syntax in SYNTAX.values())
    return next((syntax for syntax in found if syntax is not None), None)


def _as_written(syntax: CallSyntax, text: str) -> CallSyntax | None:
    """The syntax, with the details found in the text; None: the text has no call in it."""
    match syntax.shape:
        case CallShape.JSON:
            return _as_json_written(syntax, text)
        case CallShape.NAMED:
            mark = r"(\[[A-Z_]+\])"
            pattern = rf"{re.escape(syntax.begin)}\s*{_NAME}(?:{mark}{_SHORT_ID})?{mark}?\{{"
            match = re.search(pattern, text)
            if match is None or not _json_at(text, match.end() - 1):
                return None
            return replace(syntax, id_mark=match[1] or "", arguments_mark=match[2] or "")
        case CallShape.BARE_KEYS | CallShape.TAGS:
            call = syntax.written(_NAME, json.dumps({"value": _VALUE}))
            return syntax if call in text else None


def _as_json_written(syntax: CallSyntax, text: str) -> CallSyntax | None:
    opening = syntax.opening.strip()
    begin = r"\{" if syntax.bare else rf"{re.escape(syntax.begin)}(\s*{re.escape(opening)}\s*)\{{"
    for match in re.finditer(begin, text):
        call = _json_at(text, match.end() - 1)
        if call.get("name") == _NAME and syntax.arguments in call:
            return replace(syntax, opening=match[1]) if syntax.between else syntax
    return None


def _json_at(text: str, start: int) -> Mapping[str, Any]:
    """The JSON object that begins at `start`; empty if there is none."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """The prompt; empty if the template refuses."""
    try:
        return template.render(messages, tools=tools)
    except InvalidRequestError:
        return ""
