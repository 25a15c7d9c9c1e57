"""Conversations in JSON rows, as read by training and evaluation, up to the user's last message.

A row has `prompt` (one message), `turns` (user messages, of which the first is used), `messages` (OpenAI)
or `conversations` (ShareGPT). Anything after the user's last message, such as tool calls, is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_core.errors import ConfigError
from dspark_core.tokenization.texts import required_list, required_text

_SHAPES = "prompt, turns, messages or conversations"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


def chat_of(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The form expected by chat templates and OpenAI's API."""
    return [{"role": message.role, "content": message.content} for message in messages]


def parse_row(line: str | bytes, where: str) -> Mapping[str, object]:
    """One line of a JSONL file. Raises ConfigError prefixed with `where`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None
    return row_object(row, where)


def row_object(row: object, where: str) -> Mapping[str, object]:
    """Raises ConfigError prefixed with `where`."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} must be an object with {_SHAPES}, got {type(row).__name__}")
    return row


def messages_of(row: Mapping[str, object], where: str) -> tuple[Message, ...]:
    """The messages, ending with the user's last one. Raises ConfigError prefixed with `where`."""
    if row.get("turns") is not None:
        turns = required_list(row["turns"], f"{where}: 'turns'")
        return (Message("user", required_text(turns[0], f"{where}: the first of 'turns'")),)
    if row.get("prompt") is not None:
        return (Message("user", required_text(row["prompt"], f"{where}: 'prompt'")),)
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            place = f"{where}: {field!r}"
            return _conversation(required_list(row[field], place), place)
    raise ConfigError(f"{where} has no turns ({_SHAPES}); its fields are: {', '.join(row) or 'none'}")


def _conversation(rows: Sequence[object], where: str) -> tuple[Message, ...]:
    asked = [index for index, row in enumerate(rows) if _ROLES.get(_role(row)) == "user"]
    messages = tuple(_message(row, where) for row in (rows[: asked[-1] + 1] if asked else rows))
    if not asked:
        raise ConfigError(f"{where} holds no message of a user")
    return messages


def _message(row: object, where: str) -> Message:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} must hold objects, got {json.dumps(row)[:80]}")
    role = _role(row)
    if role not in _ROLES:
        raise ConfigError(f"{where}: role must be one of {', '.join(_ROLES)}, got {role!r}")
    return Message(_ROLES[role], required_text(row.get("content", row.get("value")), f"{where}: content"))


def _role(row: object) -> str:
    """Empty if the row is not a message."""
    return str(row.get("role", row.get("from"))) if isinstance(row, Mapping) else ""
