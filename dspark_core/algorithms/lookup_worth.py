"""Decides from measured rounds whether lookup pays when several requests run together.

Step times give the cost of tokens in a pass, but not the cost of finding, planning and accepting them
around it, nor, while every round verifies some, what a plain round would take now. So both ways are timed:
the better one is kept and the other tried occasionally. Only past rounds decide, so no output is biased.

Machines and loads change, so a trial is compared with rounds shortly before it that had about as many
requests, and only the ratio is remembered, which does not depend on the speed of the machine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

FIRST_ROUNDS = 32
"""Initial rounds with lookup before plain ones are tried for the first time."""
KEPT_ROUNDS, MAX_KEPT_ROUNDS = 128, 1024
"""Rounds spent in the kept way between trials: right after a change, and at most. The number doubles while
the other way is no better."""
TRIED_ROUNDS = 6
RECENT_ROUNDS = 64
"""Recent rounds of the kept way that a trial is compared with; fewer than KEPT_ROUNDS, so that none is of the
other way after a change."""
ALIKE = 1 / 16
"""Maximum relative difference in request count between rounds that are compared."""
LEAST_ALIKE = 4
"""Minimum number of comparable recent rounds per tried round."""
TRIALS = 4
"""Effective number of trials averaged: a single one of six rounds may be better or worse by chance."""
MOST_TOLD = 0.3
"""Bound on the log ratio a single trial may contribute: the machine may have been disturbed meanwhile."""


@dataclass(frozen=True, slots=True)
class _Round:
    requests: int
    tokens_per_second: float
    """Per request."""


@dataclass(slots=True)
class _Rounds:
    """Statistics of rounds whose request counts are within a factor of two."""

    gain: float = 0.0
    """Log of the speed ratio of lookup to plain rounds."""
    trials: int = 0
    kept: bool = True
    """Whether the kept way is lookup."""
    trying: bool = False
    left: int = FIRST_ROUNDS
    patience: int = KEPT_ROUNDS
    recent: deque[_Round] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))
    tried: list[_Round] = field(default_factory=list)

    @property
    def looks(self) -> bool:
        """Whether the current round should use lookup."""
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
        log_ratio = _log_ratio(self.tried, self.recent)
        self.tried.clear()
        if log_ratio is None:
            return
        self.trials = min(self.trials + 1, TRIALS)
        self.gain += ((-log_ratio if self.kept else log_ratio) - self.gain) / self.trials
        if self.kept is not (self.gain > 0.0):
            self.kept, self.patience = not self.kept, KEPT_ROUNDS
        elif log_ratio > 0.0:  # by chance, or the other way has improved
            self.patience = KEPT_ROUNDS
        else:
            self.patience = min(2 * self.patience, MAX_KEPT_ROUNDS)


class LookupWorth:
    """Ask `looks` before a round and report the round to `learn` afterwards."""

    def __init__(self) -> None:
        self._by_size: dict[int, _Rounds] = {}

    def looks(self, requests: int) -> bool:
        """Always true for a single request, which gains the most."""
        if requests < 2:
            return True
        return self._of(requests).looks

    def learn(self, requests: int, looked: bool, tokens: int, seconds: float) -> None:
        """A round of `requests` committed `tokens` in `seconds`, in total. `looked`: whether it used lookup,
        which is decided a round ahead where cohorts take turns."""
        if requests >= 2 and seconds > 0.0:
            self._of(requests).add(_Round(requests, tokens / requests / seconds), looked)

    def _of(self, requests: int) -> _Rounds:
        return self._by_size.setdefault(requests.bit_length(), _Rounds())


def _log_ratio(tried: Sequence[_Round], recent: Collection[_Round]) -> float | None:
    """Mean speed of the tried rounds over comparable recent ones; None: too few are comparable."""
    ratios = []
    for one in tried:
        most = ALIKE * one.requests
        alike = [r.tokens_per_second for r in recent if abs(r.requests - one.requests) <= most]
        if len(alike) >= LEAST_ALIKE:
            ratios.append(one.tokens_per_second * len(alike) / sum(alike))
    if 2 * len(ratios) < len(tried):
        return None
    return min(max(math.log(sum(ratios) / len(ratios)), -MOST_TOLD), MOST_TOLD)
