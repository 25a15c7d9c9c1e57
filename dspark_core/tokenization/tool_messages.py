"""Adapts conversations with tool calls to chat templates that have special requirements."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_core.tokenization.tool_style import RESULTS_FIELD, ToolStyle

Message = Mapping[str, Any]

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


def adapt_messages(messages: Sequence[Message], style: ToolStyle) -> list[dict[str, Any]]:
    """messages: as `ChatTemplate.render` takes them."""
    fitting = [dict(message) for message in messages]
    if style.short_ids:
        fitting = [_with_short_ids(message) for message in fitting]
    return _with_results_in_calls(fitting) if style.results_in_calls else fitting


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_call_id" in message:
        message["tool_call_id"] = _short(message["tool_call_id"])
    if "tool_calls" in message:
        message["tool_calls"] = [{**call, "id": _short(call["id"])} for call in message["tool_calls"]]
    return message


def _short(call_id: str) -> str:
    """Depends on the id alone, so that results still match their calls and earlier turns do not change."""
    return call_id if _SHORT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _with_results_in_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moves results into the message with their calls. A result without one stays a message."""
    fitting: list[dict[str, Any]] = []
    for message in messages:
        last = fitting[-1] if fitting else {}
        if message["role"] == "tool" and "tool_calls" in last:
            name = message.get("name", "unknown")
            last.setdefault(RESULTS_FIELD, []).append({"name": name, "response": message["content"]})
        else:
            fitting.append(message)
    return fitting
