"""Reads evaluation prompts: JSONL rows of conversations in the formats of `message_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.errors import ConfigError
from dspark_core.tokenization.message_rows import Message, chat_of, messages_of, parse_row


@dataclass(frozen=True, slots=True)
class PromptRow:
    messages: tuple[Message, ...]
    """Ends with the user's message."""

    def chat(self) -> list[dict[str, str]]:
        return chat_of(self.messages)


@dataclass(frozen=True, slots=True)
class PromptSet:
    name: str
    """File name without its extension."""
    rows: tuple[PromptRow, ...]


def find_prompt_files(paths: Sequence[Path]) -> list[Path]:
    """Files as given, directories expanded to their *.jsonl files sorted by name.

    Raises:
        ConfigError: a path does not exist, a directory holds no JSONL, or two files have the same name.
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
        ConfigError: names the file and the malformed line, or the file without rows.
    """
    rows: list[PromptRow] = []
    try:
        # Not splitlines(): JSON strings may contain U+2028 and other characters that it splits at.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
    return PromptRow(messages_of(parse_row(line, where), where))
