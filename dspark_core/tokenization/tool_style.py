"""Which way a chat template has its model write calls of tools, and what else it does about them.

No names of models here: a template is shown a conversation with a call, and what it makes of it says.
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
    """What a template does about tools."""

    syntax: CallSyntax
    native: bool
    """It tells the model of tools itself; else conversations have to (`tool_prompts.py`)."""
    has_system: bool = True
    """It takes a message of the system."""
    short_ids: bool = False
    """It takes no ids of calls but those of nine letters and digits."""
    results_in_calls: bool = False
    """It writes what calls returned only as a part of the message that has the calls."""


def tool_style(template: ChatTemplate | None, asked: ToolFormat | None = None) -> ToolStyle:
    """asked: a format to use whatever the template shows; None: the template's.

    A template that tells of tools, but writes calls in none of the formats, is not asked to: its model would
    answer with calls that nobody here understands.
    """
    if template is None:
        return ToolStyle(SYNTAX[asked or ToolFormat.HERMES], native=False)
    written = _written_by(template)
    if asked is not None and (written is None or written.format is not asked):
        syntax, native = SYNTAX[asked], _tells_of_tools(template)
    else:
        syntax = written or SYNTAX[ToolFormat.HERMES]
        native = written is not None and _tells_of_tools(template)
    return ToolStyle(
        syntax,
        native,
        has_system=_takes_system(template),
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


def _tells_of_tools(template: ChatTemplate) -> bool:
    return _NAME in _rendered(template, [_USER], [_TOOL])


def _takes_system(template: ChatTemplate) -> bool:
    return _SYSTEM in _rendered(template, [{"role": "system", "content": _SYSTEM}, _USER])


def _takes_call(template: ChatTemplate, call_id: str) -> bool:
    return bool(_rendered(template, [_USER, _calling(call_id), _result(call_id)]))


def _wants_results_in_calls(template: ChatTemplate) -> bool:
    """Their own role is written like any other's, if at all."""
    calling = {**_calling(), RESULTS_FIELD: [{"name": _NAME, "response": _OUTPUT}]}
    return (
        _OUTPUT in _rendered(template, [_USER, calling])
        and _rendered(template, [_USER, _calling(), _result()]).count(_NAME) < 2
    )


RESULTS_FIELD = "tool_responses"
"""Of a message with calls, in templates that write there what the calls returned."""


def _written_by(template: ChatTemplate) -> CallSyntax | None:
    """How it writes calls; None: it writes none, or in another format."""
    # Some templates want a call to be answered, others know no role for that.
    text = _rendered(template, [_USER, _calling()]) + _rendered(template, [_USER, _calling(), _result()])
    found = (_as_written(syntax, text) for syntax in SYNTAX.values())
    return next((syntax for syntax in found if syntax is not None), None)


def _as_written(syntax: CallSyntax, text: str) -> CallSyntax | None:
    """The syntax, in the details that the text shows; None: it is another one."""
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
        case CallShape.BARE_KEYS:
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
    """The JSON object that begins there; empty: none does."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """Empty where the template refuses."""
    try:
        return template.render(messages, tools=tools)
    except InvalidRequestError:
        return ""
