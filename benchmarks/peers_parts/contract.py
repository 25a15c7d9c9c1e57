"""What every engine of the comparison is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Trial:
    """Prompts answered at once, greedily, `max_tokens` each: stop tokens do not end an answer."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times are from the start of the trial, one for each prompt."""

    tokens: tuple[tuple[int, ...], ...]
    first_token_seconds: tuple[float, ...]
    finish_seconds: tuple[float, ...]
    accepted_length: float = 1.0

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / max(self.finish_seconds)

    @property
    def tokens_per_second_per_user(self) -> float:
        """Mean over the answers."""
        rates = [len(ids) / seconds for ids, seconds in zip(self.tokens, self.finish_seconds, strict=True)]
        return sum(rates) / len(rates)

    @property
    def mean_first_token_seconds(self) -> float:
        return sum(self.first_token_seconds) / len(self.first_token_seconds)


class Peer(Protocol):
    def run(self, trial: Trial) -> Outcome: ...


class Stopwatch:
    """Collects tokens of several answers and when they came."""

    def __init__(self, count: int, clock: float) -> None:
        self._started = clock
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._first = [0.0] * count
        self._last = [0.0] * count

    def add(self, index: int, token_ids: Sequence[int], now: float) -> None:
        if not self.tokens[index]:
            self._first[index] = now - self._started
        self.tokens[index].extend(token_ids)
        self._last[index] = now - self._started

    def outcome(self, accepted_length: float = 1.0) -> Outcome:
        return Outcome(tuple(map(tuple, self.tokens)), tuple(self._first), tuple(self._last), accepted_length)
