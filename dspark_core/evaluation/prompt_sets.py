"""Reads prompts: JSONL rows of the user's turns, the first of which is asked, of one `prompt`, or of a
conversation's `messages`, up to the user's last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.errors import ConfigError
from dspark_core.tokenization.texts import lone_surrogate

_ROLES = ("system", "user", "assistant")
_SHAPES = "'turns', 'prompt' or 'messages'"


@dataclass(frozen=True, slots=True)
class PromptRow:
    messages: tuple[tuple[str, str], ...]
    """Role and content of each. The last is the user's."""

    @classmethod
    def of_user(cls, text: str) -> PromptRow:
        return cls((("user", text),))

    def chat(self) -> list[dict[str, str]]:
        """As chat templates take it."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True, slots=True)
class PromptSet:
    name: str
    """The file's name without its ending."""
    rows: tuple[PromptRow, ...]


def find_prompt_files(paths: Sequence[Path]) -> list[Path]:
    """Files as given, directories as their *.jsonl sorted by name.

    Raises:
        ConfigError: a path does not exist, a directory holds no JSONL, or two files have one name.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if not found:
                raise ConfigError(f"directory {path} holds no .jsonl file")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"prompt file {path} not found")
    by_name: dict[str, Path] = {}
    for file in files:
        other = by_name.setdefault(file.stem, file)
        if other is not file:
            raise ConfigError(f"two prompt files are named {file.stem!r}: {other} and {file}")
    return files


def read_prompt_set(path: Path, limit: int | None = None) -> PromptSet:
    """The first `limit` rows of a file; empty lines do not count.

    Raises:
        ConfigError: a row has no such field or no text, or none is left; names file and line.
    """
    rows: list[PromptRow] = []
    try:
        # Not splitlines(): JSON texts may hold U+2028 and others that it takes for line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(rows) >= limit:
            break
        if line.strip():
            rows.append(_read_row(line, f"{path}:{number}"))
    if not rows:
        raise ConfigError(f"{path} holds no rows")
    return PromptSet(path.stem, tuple(rows))


def _read_row(line: str, where: str) -> PromptRow:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be an object with {_SHAPES}, got {type(row).__name__}")
    if "turns" in row:
        turns = _sequence(row["turns"], f"{where}: 'turns'")
        return PromptRow.of_user(_text(turns[0], f"{where}: the first of 'turns'"))
    if "prompt" in row:
        return PromptRow.of_user(_text(row["prompt"], f"{where}: 'prompt'"))
    if "messages" in row:
        return PromptRow(_conversation(_sequence(row["messages"], f"{where}: 'messages'"), where))
    raise ConfigError(f"{where} has no {_SHAPES}; its fields are: {', '.join(row) or 'none'}")


def _conversation(rows: list[object], where: str) -> tuple[tuple[str, str], ...]:
    """Up to the last message of the user; what follows is not looked at, such as calls of tools."""
    last = max((index for index, row in enumerate(rows) if _role(row) == "user"), default=None)
    if last is None:
        raise ConfigError(f"{where}: 'messages' holds no message of a user")
    messages = []
    for row in rows[: last + 1]:
        if not isinstance(row, dict) or _role(row) not in _ROLES:
            roles, got = ", ".join(_ROLES), json.dumps(row)[:80]
            raise ConfigError(f"{where}: 'messages' must hold objects of role {roles}, got {got}")
        messages.append((_role(row), _text(row.get("content"), f"{where}: 'messages': content")))
    return tuple(messages)


def _role(row: object) -> str:
    return str(row.get("role")) if isinstance(row, dict) else ""


def _sequence(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a non-empty list, got {json.dumps(value)[:80]}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} must be a non-empty text, got {json.dumps(value)[:80]}")
    if (half := lone_surrogate(value)) is not None:
        raise ConfigError(f"{where} holds {half}, which is no text")
    return value
