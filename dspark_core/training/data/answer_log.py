"""Append-only file of answers, one JSON line each; survives being killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from dspark_core.errors import ConfigError
from dspark_core.records import FinishReason, SamplingParams
from dspark_core.training.file_lock import lock

SETTINGS_SUFFIX = ".settings.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One training conversation and where it came from."""

    prompt_id: str
    domain: str
    source: str
    sampling: SamplingParams
    finish: FinishReason
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def line(self) -> str:
        row = {
            "id": self.prompt_id,
            "domain": self.domain,
            "source": self.source,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            "finish": self.finish.value,
            "prompt_ids": self.prompt_ids,
            "answer_ids": self.answer_ids,
        }
        return json.dumps(row, ensure_ascii=False) + "\n"


class AnswerLog:
    """Appends answers and knows which prompts already have one. Locked to one process at a time.

    The generation settings are stored beside the file; resuming with different ones would mix two data
    sets and is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Drops a truncated last line. Raises ConfigError naming the file and the line or setting."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write answers to {path}: {error}") from error
        try:
            lock(self._file, str(self.path))
            self._settle(settings)
            self._asked = self._repair()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    @property
    def done(self) -> Set[str]:
        """Ids of the prompts that have an answer."""
        return self._asked.keys()

    def require_same_prompt(self, prompt_id: str, prompt_ids: tuple[int, ...]) -> None:
        """Raises ConfigError when the existing answer under this id is to another prompt."""
        if self._asked.get(prompt_id, hash(prompt_ids)) != hash(prompt_ids):
            raise ConfigError(
                f"{self.path} answers another prompt with id {prompt_id!r}: give prompts that changed other "
                "ids, or choose another file"
            )

    def append(self, answer: Answer) -> None:
        """The whole line is in the file when this returns."""
        content = answer.line().encode()
        while content:
            content = content[os.write(self._file, content) :]
        self._asked[answer.prompt_id] = hash(answer.prompt_ids)

    def _settle(self, settings: Mapping[str, object]) -> None:
        path = self.path.with_name(self.path.name + SETTINGS_SUFFIX)
        if os.fstat(self._file).st_size == 0:
            path.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
            return
        known = read_settings(self.path)
        if known is None:
            raise ConfigError(f"{self.path} holds answers, but {path.name} with their settings is missing")
        wanted = json.loads(json.dumps(dict(settings)))
        names = dict.fromkeys((*known, *wanted))
        if differing := [name for name in names if known.get(name) != wanted.get(name)]:
            changes = "; ".join(f"{name} {known.get(name)!r}, not {wanted.get(name)!r}" for name in differing)
            raise ConfigError(f"{self.path} was begun with other settings ({changes}): choose another file")

    def _repair(self) -> dict[str, int]:
        """Cut off an unfinished last line -> hashes of the prompts by answer id."""
        asked: dict[str, int] = {}
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break  # killed while writing it
                try:
                    row = json.loads(line)
                    asked[str(row["id"])] = hash(tuple(row["prompt_ids"]))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ConfigError(f"{self.path}:{number} is not an answer: {error!r}") from error
                end += len(line)
        os.ftruncate(self._file, end)
        return asked


def read_settings(answers: Path) -> dict[str, object] | None:
    """Settings the answers were generated with; None: they were not written by an AnswerLog."""
    path = answers.with_name(answers.name + SETTINGS_SUFFIX)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold an object, got {type(values).__name__}")
    return values
