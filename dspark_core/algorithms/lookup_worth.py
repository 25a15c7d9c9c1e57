"""Whether looking drafts up pays in rounds of several requests, by what rounds with and without it gave.

Step times tell what tokens cost in a pass. They do not tell what finding, planning and accepting them costs
around it, nor, where every round verifies some, what a plain round would take by now. So both ways are timed:
the better one is kept, the other tried now and then. Rounds that are over decide, so no output is biased.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KEPT_ROUNDS, MAX_KEPT_ROUNDS = 128, 1024
"""Rounds in one way before the other is tried: at first, and at most, doubling while it is not better."""
TRIED_ROUNDS = 6
RATE = 0.05
"""Weight of the newest round in what a way is thought to give."""


@dataclass(slots=True)
class _Way:
    tokens_per_second: float | None = None

    def learn(self, tokens_per_second: float) -> None:
        known = self.tokens_per_second
        self.tokens_per_second = (
            tokens_per_second if known is None else known + RATE * (tokens_per_second - known)
        )


@dataclass(slots=True)
class _Rounds:
    """Of about as many requests."""

    ways: tuple[_Way, _Way] = field(default_factory=lambda: (_Way(), _Way()))
    """Without and with looking up."""
    kept: bool = True
    trying: bool = False
    left: int = KEPT_ROUNDS
    patience: int = KEPT_ROUNDS

    @property
    def looks(self) -> bool:
        """Of the two ways the one to go now."""
        return self.kept is not self.trying


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
        if requests < 2 or seconds <= 0.0:
            return
        known = self._of(requests)
        # By request: of a size there are up to twice as many.
        known.ways[looked].learn(tokens / requests / seconds)
        known.left -= looked is known.looks
        if known.left > 0:
            return
        if not known.trying:
            known.trying, known.left = True, TRIED_ROUNDS
            return
        kept, tried = (known.ways[way].tokens_per_second or 0.0 for way in (known.kept, not known.kept))
        if tried > kept:
            known.kept, known.patience = not known.kept, KEPT_ROUNDS
        else:
            known.patience = min(2 * known.patience, MAX_KEPT_ROUNDS)
        known.trying, known.left = False, known.patience

    def _of(self, requests: int) -> _Rounds:
        return self._by_size.setdefault(requests.bit_length(), _Rounds())
