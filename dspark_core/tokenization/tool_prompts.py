"""Expresses conversations with tools in plain messages, for templates without tool support."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_core.tokenization.tool_formats import CallShape, CallSyntax
from dspark_core.tokenization.tool_style import ToolStyle

Message = Mapping[str, Any]

_RESULT, _RESULT_END = "<tool_response>", "</tool_response>"


def spell_out_tools(
    messages: Sequence[Message], tools: Sequence[Message], style: ToolStyle
) -> list[dict[str, Any]]:
    """The conversation, with what the template cannot express spelled out in universally supported roles."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"{_RESULT}\n{message['content']}\n{_RESULT_END}"
            if plain and plain[-1].get("results"):
                # Results of one answer's calls form one turn, as many templates require alternating turns.
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result, "results": True})
        else:
            kept = {name: message[name] for name in ("role", "reasoning_content") if name in message}
            plain.append({**kept, "content": _content(message, style.syntax)})
    for message in plain:
        message.pop("results", None)
    return _introduced(plain, _introduction(tools, style.syntax), style) if tools else plain


def _content(message: Message, syntax: CallSyntax) -> str:
    calls = [
        syntax.written(call["function"]["name"], _json(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]
    return "\n".join([*([message["content"]] if message["content"] or not calls else []), *calls])


def _json(arguments: object) -> str:
    """Arguments given as text are what a model wrote and is not JSON; they stay unchanged."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _introduction(tools: Sequence[Message], syntax: CallSyntax) -> str:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    tagged = syntax.shape is CallShape.TAGS
    as_json = "" if tagged else " as JSON"
    arguments = '{"PARAMETER": "VALUE"}' if tagged else "{...}"
    named = (
        "PARAMETER and VALUE for the name and value of each argument" if tagged else "{...} for its arguments"
    )
    several = "" if syntax.bare else " Write one such block for each call."
    return (
        "You may call functions to help with what the user asks. These are the functions, each with its "
        f"parameters as a JSON schema:\n<tools>\n{listed}\n</tools>\n"
        f"To call a function, answer with its name and its arguments{as_json}, and nothing else:\n"
        f"{syntax.written('NAME', arguments)}\n"
        f"NAME stands for the function's name, {named}.{several} "
        f"What a function returns is given to you between {_RESULT} and {_RESULT_END}."
    )


def _introduced(messages: list[dict[str, Any]], text: str, style: ToolStyle) -> list[dict[str, Any]]:
    """Puts `text` first: in the system message, or in the first message if there can be none."""
    first = messages[0]
    if style.has_system and first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]
