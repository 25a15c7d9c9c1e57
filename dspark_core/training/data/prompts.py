"""Training prompts: conversations up to the user's last message, one JSON line each.

Rows come as `prompt` (one message), `turns` (user messages, of which the first is asked),
`messages` (OpenAI's) or `conversations` (ShareGPT's); an answer at the end is dropped, because
the target writes its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.errors import ConfigError
from dspark_core.tokenization.texts import lone_surrogate

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_SHAPES = "prompt, turns, messages or conversations"


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the target is asked. `messages` ends with the user's."""

    prompt_id: str
    messages: tuple[Message, ...]
    domain: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """All messages, for comparing prompts."""
        return "\n".join(message.content for message in self.messages)

    def chat(self) -> list[dict[str, str]]:
        """As chat templates and OpenAI's API take it."""
        return [{"role": message.role, "content": message.content} for message in self.messages]

    def line(self) -> str:
        row: dict[str, object] = {"id": self.prompt_id, "domain": self.domain, "source": self.source}
        if len(self.messages) == 1:
            row["prompt"] = self.messages[0].content
        else:
            row["messages"] = self.chat()
        return json.dumps(row, ensure_ascii=False) + "\n"


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Empty lines are skipped. Raises ConfigError naming file and line."""
    try:
        with path.open("rb") as lines:  # bytes: only a line feed ends a line of JSON
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_prompt(_parse_json(line, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"prompts {path} cannot be read: {error}") from error


def parse_prompt(row: object, where: str, *, source: str = "") -> Prompt:
    """Raises ConfigError, beginning with `where`, for a row without turns."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} must be an object with {_SHAPES}, got {type(row).__name__}")
    messages = _messages(row, where)
    return Prompt(
        prompt_id=str(row.get("id") or _content_id(messages)),
        messages=messages,
        domain=str(row.get("domain") or ""),
        source=str(row.get("source") or source),
    )


def user_prompt(text: str, *, domain: str, source: str) -> Prompt:
    """One user message, with an id that follows from it."""
    messages = (Message("user", text),)
    return Prompt(prompt_id=_content_id(messages), messages=messages, domain=domain, source=source)


def _parse_json(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error


def _messages(row: Mapping[str, object], where: str) -> tuple[Message, ...]:
    if row.get("prompt") is not None:
        return (Message("user", _text(row["prompt"], f"{where}: 'prompt'")),)
    if row.get("turns") is not None:
        turns = _sequence(row["turns"], f"{where}: 'turns'")
        return (Message("user", _text(turns[0], f"{where}: the first of 'turns'")),)
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            return _conversation(_sequence(row[field], f"{where}: {field!r}"), f"{where}: {field!r}")
    raise ConfigError(f"{where} has no turns ({_SHAPES}); its fields are: {', '.join(row) or 'none'}")


def _conversation(rows: Sequence[object], where: str) -> tuple[Message, ...]:
    """Up to the last message of the user; what follows is not looked at, such as calls of tools."""
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
    return Message(_ROLES[role], _text(row.get("content", row.get("value")), f"{where}: content"))


def _role(row: object) -> str:
    """Empty for what is no message."""
    return str(row.get("role", row.get("from"))) if isinstance(row, Mapping) else ""


def _sequence(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a non-empty list, got {json.dumps(value, default=str)[:80]}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} must be a non-empty text, got {json.dumps(value, default=str)[:80]}")
    if (half := lone_surrogate(value)) is not None:
        raise ConfigError(f"{where} holds {half}, which is no text")
    return value


def _content_id(messages: Sequence[Message]) -> str:
    content = json.dumps([(message.role, message.content) for message in messages])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
