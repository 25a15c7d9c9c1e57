"""Conversations as token ids: the JSONL file between generation and features."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Conversation:
    """Prompt and answer of one training example, in the target's tokens."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


class Conversations(Protocol):
    """Numbered conversations, fetched in batches because some sources produce them cheaper together."""

    def __len__(self) -> int: ...

    def get(self, numbers: Sequence[int]) -> list[Conversation]:
        """The conversations in the order of `numbers`; must depend on the numbers alone."""
        ...


class AnswerFile:
    """Random access to a JSONL file of conversations; only offsets and lengths are kept in memory."""

    def __init__(self, path: Path, *, max_tokens: int | None = None, min_answer_tokens: int = 1) -> None:
        """Skips conversations longer than `max_tokens` or with answers shorter than `min_answer_tokens`.

        Raises ConfigError naming file and line, or the file when no conversation remains.
        """
        self.path = path
        self.too_long = 0
        self.too_short = 0
        self._starts = array("q")
        self._lengths = array("q")
        for start, conversation in _positions(path):
            if len(conversation.answer_ids) < min_answer_tokens:
                self.too_short += 1
            elif max_tokens is not None and len(conversation) > max_tokens:
                self.too_long += 1
            else:
                self._starts.append(start)
                self._lengths.append(len(conversation))
        if not self._starts:
            raise ConfigError(
                f"answers {path} hold no conversation to use "
                f"({self.too_long} longer than {max_tokens} tokens, {self.too_short} with too short answers)"
            )

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def lengths(self) -> Sequence[int]:
        """Length of each conversation in tokens."""
        return self._lengths

    def get(self, numbers: Sequence[int]) -> list[Conversation]:
        found = []
        with self.path.open("rb") as file:
            for number in numbers:
                file.seek(self._starts[number])
                found.append(_parse(file.readline(), f"{self.path}, byte {self._starts[number]}"))
        return found


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Rows `{"prompt_ids": [...], "answer_ids": [...]}` of a JSONL file; further fields are ignored.

    Raises ConfigError naming file and line.
    """
    return (conversation for _, conversation in _positions(path))


def _positions(path: Path) -> Iterator[tuple[int, Conversation]]:
    """Each conversation with the byte offset of its line."""
    start = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield start, _parse(line, f"{path}:{number}")
                start += len(line)
    except OSError as error:
        raise ConfigError(f"answers {path} cannot be read: {error}") from error


def _parse(line: bytes, where: str) -> Conversation:
    try:
        row = json.loads(line)
        found = Conversation(_token_ids(row["prompt_ids"]), _token_ids(row["answer_ids"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}: not a conversation: {error!r}") from error
    if not found.prompt_ids or not found.answer_ids:
        empty = "answer_ids" if found.prompt_ids else "prompt_ids"
        raise ConfigError(f"{where}: not a conversation: {empty} is empty")
    return found


def _token_ids(values: list[int]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("token ids must be integers >= 0")
    return tuple(values)
