"""Filters training prompts: drops duplicates, benchmark overlap, and too short or too long prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from dspark_core.errors import ConfigError
from dspark_core.training.data.prompts import Prompt

RUN_WORDS = 13
"""A prompt that shares this many consecutive words with a benchmark counts as contaminated."""

_WORD = re.compile(r"\w+")


class Refusal(Enum):
    REPEATED = "repeated"
    EXCLUDED = "shared with an excluded file"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"


class Exclusions:
    """Texts no prompt may share `RUN_WORDS` consecutive words with; shorter texts must not match whole."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs: set[int] = set()
        self._short: set[tuple[str, ...]] = set()
        for text in texts:
            words = _words(text)
            if len(words) < RUN_WORDS:
                self._short.add(words)
            self._runs.update(_runs(words))

    def match(self, text: str) -> bool:
        words = _words(text)
        return words in self._short or any(run in self._runs for run in _runs(words))


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimits:
    """Limits in the target's tokens."""

    min_tokens: int = 4
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(
                "min_tokens and max_tokens must fulfil 1 <= min_tokens <= max_tokens, "
                f"got {self.min_tokens} and {self.max_tokens}"
            )


@dataclass(slots=True)
class PromptFilter:
    """Keeps the first of equal prompts; counts refused prompts by reason."""

    count_tokens: Callable[[str], int]
    limits: LengthLimits = LengthLimits()
    exclusions: Exclusions = field(default_factory=lambda: Exclusions(()))
    refused: Counter[Refusal] = field(default_factory=Counter)
    kept: int = 0
    _seen: set[int] = field(default_factory=set)
    _ids: set[str] = field(default_factory=set)

    def keep(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """The kept prompts, with unique ids."""
        for prompt in prompts:
            refusal = self._judge(prompt.text)
            if refusal is not None:
                self.refused[refusal] += 1
                continue
            self.kept += 1
            unique = (
                prompt
                if prompt.prompt_id not in self._ids
                else replace(prompt, prompt_id=self._free_id(prompt))
            )
            self._ids.add(unique.prompt_id)
            yield unique

    def _judge(self, text: str) -> Refusal | None:
        key = hash(" ".join(text.casefold().split()))
        if key in self._seen:
            return Refusal.REPEATED
        self._seen.add(key)
        tokens = self.count_tokens(text)
        if tokens < self.limits.min_tokens:
            return Refusal.TOO_SHORT
        if tokens > self.limits.max_tokens:
            return Refusal.TOO_LONG
        return Refusal.EXCLUDED if self.exclusions.match(text) else None

    def _free_id(self, prompt: Prompt) -> str:
        """A unique id, since different files may number their rows alike."""
        number = 2
        while (candidate := f"{prompt.prompt_id}-{number}") in self._ids:
            number += 1
        return candidate


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _runs(words: tuple[str, ...]) -> Iterator[int]:
    return (hash(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1))
