"""The interface of the compared engines: what they are asked for and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Trial:
    """Prompts to answer greedily with `max_tokens` tokens each; stop tokens do not end an answer."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    users: int
    """Number of concurrent prompts; a user who gets an answer asks for the next one."""

    def waves(self) -> Iterator[range]:
        """Indices of the prompts in each batch, for engines whose batches start and end together."""
        for start in range(0, len(self.prompts), self.users):
            yield range(start, min(start + self.users, len(self.prompts)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times of an answer count from when it was requested."""

    tokens: tuple[tuple[int, ...], ...]
    first_token_seconds: tuple[float, ...]
    answer_seconds: tuple[float, ...]
    seconds: float
    """Duration of the whole trial."""
    accepted_length: float = 1.0

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def tokens_per_second_per_user(self) -> float:
        """Mean over the answers."""
        rates = [len(ids) / seconds for ids, seconds in zip(self.tokens, self.answer_seconds, strict=True)]
        return sum(rates) / len(rates)

    @property
    def mean_first_token_seconds(self) -> float:
        return sum(self.first_token_seconds) / len(self.first_token_seconds)


class Peer(Protocol):
    def run(self, trial: Trial) -> Outcome: ...


class Stopwatch:
    """Collects the tokens of several answers and their arrival times."""

    def __init__(self, trial: Trial, now: float) -> None:
        count = len(trial.prompts)
        self._started = now
        self._asked = [now] * count
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._first = [now] * count
        self._last = [now] * count

    def ask(self, index: int, now: float) -> None:
        self._asked[index] = now

    def add(self, index: int, token_ids: Sequence[int], now: float) -> None:
        if not self.tokens[index]:
            self._first[index] = now
        self.tokens[index].extend(token_ids)
        self._last[index] = now

    def outcome(self, accepted_length: float = 1.0) -> Outcome:
        return Outcome(
            tuple(map(tuple, self.tokens)),
            tuple(first - asked for first, asked in zip(self._first, self._asked, strict=True)),
            tuple(last - asked for last, asked in zip(self._last, self._asked, strict=True)),
            max(self._last) - self._started,
            accepted_length,
        )


class Users:
    """Simulates the users of an engine that accepts requests at any time."""

    def __init__(self, trial: Trial, ask: Callable[[int], None]) -> None:
        """`ask` submits the prompt with the given index."""
        self._ask, self._waiting = ask, iter(range(len(trial.prompts)))
        for _ in range(trial.users):
            self.next()

    def next(self) -> None:
        """An answer has ended: submit the next prompt, if any."""
        for index in self._waiting:
            self._ask(index)
            return
