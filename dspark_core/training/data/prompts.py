"""Training prompts: conversations up to the user's last message, one JSON line each.

`message_rows` defines the row format. A final answer is dropped, because the target writes its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.errors import ConfigError
from dspark_core.tokenization.message_rows import Message, chat_of, messages_of, parse_row, row_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation for the target to answer; the last of `messages` is the user's."""

    prompt_id: str
    messages: tuple[Message, ...]
    domain: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """All messages, for comparing prompts."""
        return "\n".join(message.content for message in self.messages)

    def chat(self) -> list[dict[str, str]]:
        """Messages in the format of chat templates and OpenAI's API."""
        return chat_of(self.messages)

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
        with path.open("rb") as lines:  # bytes, because only a line feed ends a line of JSON
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_prompt(parse_row(line, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"prompts {path} cannot be read: {error}") from error


def parse_prompt(row: object, where: str, *, source: str = "") -> Prompt:
    """Raises ConfigError, beginning with `where`, for a row without messages."""
    row = row_object(row, where)
    messages = messages_of(row, where)
    return Prompt(
        prompt_id=str(row.get("id") or _content_id(messages)),
        messages=messages,
        domain=str(row.get("domain") or ""),
        source=str(row.get("source") or source),
    )


def user_prompt(text: str, *, domain: str, source: str) -> Prompt:
    """One user message, with an id derived from its content."""
    messages = (Message("user", text),)
    return Prompt(prompt_id=_content_id(messages), messages=messages, domain=domain, source=source)


def _content_id(messages: Sequence[Message]) -> str:
    content = json.dumps([(message.role, message.content) for message in messages])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
