"""Answers as token ids: the JSONL file between generation and features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Conversation:
    """Prompt and answer of one training example, in the target's tokens."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Rows `{"prompt_ids": [...], "answer_ids": [...]}` of a JSONL file; further fields are ignored.

    Raises ConfigError naming file and line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parse(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"answers {path} cannot be read: {error}") from error


def _parse(line: str, where: str) -> Conversation:
    try:
        row = json.loads(line)
        found = Conversation(_token_ids(row["prompt_ids"]), _token_ids(row["answer_ids"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: not a conversation: {error!r}") from error
    if not found.prompt_ids or not found.answer_ids:
        empty = "answer_ids" if found.prompt_ids else "prompt_ids"
        raise ConfigError(f"{where}: not a conversation: {empty} is empty")
    return found


def _token_ids(values: list[int]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("token ids must be integers >= 0")
    return tuple(values)
