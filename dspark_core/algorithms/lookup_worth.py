"""Whether looking drafts up pays in rounds of several requests, by what rounds with and without it gave.

Step times tell what tokens cost in a pass. They do not tell what finding, planning and accepting them costs
around it, nor, where every round verifies some, what a plain round would take by now. So both ways are timed:
the better one is kept, the other tried now and then. Rounds that are over decide, so no output is biased.

Machines and loads change, so a trial is compared with rounds shortly before it, of about as many requests.
What is remembered of it is a ratio, which is the same on a faster machine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

FIRST_ROUNDS = 32
"""That look up before plain ones are tried for the first time: nothing is known yet."""
KEPT_ROUNDS, MAX_KEPT_ROUNDS = 128, 1024
"""Rounds in one way until the other is tried: after a change, and at most, doubling while it is no better."""
TRIED_ROUNDS = 6
RECENT_ROUNDS = 64
"""Of the way that is kept, with which those of a trial are compared."""
ALIKE = 1 / 16
"""By how much of them requests may be more or fewer, or their number makes the difference."""
LEAST_ALIKE = 4
"""Recent rounds of as many requests as a tried one, or nobody knows what it would have given."""
TRIALS = 4
"""That are remembered, about: six rounds are better or worse by chance."""
MOST_TOLD = 0.3
"""By one trial, as a logarithm: the machine may have done something else meanwhile."""


@dataclass(frozen=True, slots=True)
class _Round:
    requests: int
    tokens_per_second: float
    """Of a request."""


@dataclass(slots=True)
class _Rounds:
    """Of about as many requests, within a factor of two."""

    gain: float = 0.0
    """By looking up, the logarithm of a ratio."""
    trials: int = 0
    kept: bool = True
    """Whether the way that is kept is looking up."""
    trying: bool = False
    left: int = FIRST_ROUNDS
    patience: int = KEPT_ROUNDS
    recent: deque[_Round] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))
    tried: list[_Round] = field(default_factory=list)

    @property
    def looks(self) -> bool:
        """Of the two ways the one to go now."""
        return self.kept is not self.trying

    def add(self, one: _Round, looked: bool) -> None:
        if looked is self.kept:
            self.recent.append(one)
        elif self.trying:
            self.tried.append(one)
        self.left -= looked is self.looks
        if self.left > 0:
            return
        if self.trying:
            self._judge()
        self.trying = not self.trying
        self.left = TRIED_ROUNDS if self.trying else self.patience

    def _judge(self) -> None:
        told = _log_ratio(self.tried, self.recent)
        self.tried.clear()
        if told is None:
            return
        self.trials = min(self.trials + 1, TRIALS)
        self.gain += ((-told if self.kept else told) - self.gain) / self.trials
        if self.kept is not (self.gain > 0.0):
            self.kept, self.patience = not self.kept, KEPT_ROUNDS
            self.recent.clear()
        elif told > 0.0:  # by chance, or it has become better
            self.patience = KEPT_ROUNDS
        else:
            self.patience = min(2 * self.patience, MAX_KEPT_ROUNDS)


class LookupWorth:
    """Ask `looks` before a round and tell `learn` of it afterwards."""

    def __init__(self) -> None:
        self._by_size: dict[int, _Rounds] = {}

    def looks(self, requests: int) -> bool:
        """A request that is alone gains the most and is always looked up for."""
        if requests < 2:
            return True
        return self._of(requests).looks

    def learn(self, requests: int, looked: bool, tokens: int, seconds: float) -> None:
        """A round of so many requests committed `tokens` in `seconds`, all told. `looked`: which way it went,
        which where cohorts take turns was decided a round before."""
        if requests >= 2 and seconds > 0.0:
            self._of(requests).add(_Round(requests, tokens / requests / seconds), looked)

    def _of(self, requests: int) -> _Rounds:
        return self._by_size.setdefault(requests.bit_length(), _Rounds())


def _log_ratio(tried: Sequence[_Round], recent: Collection[_Round]) -> float | None:
    """What the tried rounds gave over what recent ones did; None: too few of them are alike."""
    ratios = []
    for one in tried:
        most = ALIKE * one.requests
        alike = [r.tokens_per_second for r in recent if abs(r.requests - one.requests) <= most]
        if len(alike) >= LEAST_ALIKE:
            ratios.append(one.tokens_per_second * len(alike) / sum(alike))
    if 2 * len(ratios) < len(tried):
        return None
    return min(max(math.log(sum(ratios) / len(ratios)), -MOST_TOLD), MOST_TOLD)
