"""Finds the best plan of all, step times jagged as they may be, under speed floors.

It looks at the whole round, so it plans only requests whose lengths cannot bias their output
(coupled and greedy acceptance), and rounds that are over (`delayed_scheduler`). For a given number
of draft tokens the best choice is greedy: what the floors need, then the tokens most likely to
survive; so it is enough to try every number. A floor that its request cannot reach with any length,
not even alone, is left out. Where the others cannot all hold they are relaxed by one common factor,
the least that is needed.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, rank
from dspark_core.algorithms.prefix_scheduler import best_count
from dspark_core.algorithms.speed_floor import TOLERANCE, expected_tokens
from dspark_core.algorithms.step_surface import Floats

RELAXATIONS = 10
"""Bisection steps to the common factor: it is found to one part in a thousand."""


def search(batch: PlanBatch, seconds: Floats, fixed: Ints, free: Bools) -> Ints:
    """The best lengths of the `free` requests while the others keep `fixed` -> lengths [requests].

    Maximises weighted tokens per second; of equal plans the one with fewer tokens. `seconds[n]` of
    the round with n draft tokens in all.
    """
    held = np.where(free, 0, fixed)
    remaining = seconds[int(held.sum()) :]
    kept = expected_tokens(batch, held)
    total = float(kept @ batch.weights)
    ranking = rank(batch, free)
    if not batch.floors.any():
        return held + ranking.lengths(best_count(ranking, total, remaining), batch.requests)
    floors = _Floors(batch, kept, remaining[: len(ranking.values) + 1], free)
    needed, feasible = floors.needed(_largest_factor(floors))
    return held + _best_under(batch, ranking, total, remaining, needed, feasible)


class _Floors:
    """How many tokens each floor needs, for every count of draft tokens in the round."""

    def __init__(self, batch: PlanBatch, kept: Floats, seconds: Floats, free: Bools) -> None:
        self._batch = batch
        self._seconds = seconds
        members = (free & (batch.floors > 0)).nonzero()[0]
        rows = batch.survival[members]
        tokens = (rows >= 0.0).sum(axis=1)
        gains = np.concatenate((np.ones((len(rows), 1)), np.maximum(rows, 0.0)), axis=1)
        expected = np.cumsum(gains, axis=1)  # [members, 1 + block] by length
        # The shortest a round may get from each count on: the best a request can do with a length.
        shortest = np.minimum.accumulate(seconds[::-1])[::-1][: expected.shape[1]]
        fastest = (expected[:, : len(shortest)] / shortest).max(axis=1)
        within = fastest >= batch.floors[members] * (1.0 - TOLERANCE)
        self._members = members[within]
        self._expected, self._tokens = expected[within], tokens[within, None]
        # Requests with given lengths: floors that hold must go on to; others cannot be helped here.
        given = ~free & (batch.floors > 0)
        limits = kept[given] / batch.floors[given] / (1.0 - TOLERANCE)
        self._longest = limits[limits >= seconds[0]].min(initial=np.inf)

    def needed(self, factor: float) -> tuple[Ints, Bools]:
        """Lengths [requests, counts] that hold `factor` times the floors, and where they can be had."""
        floors = self._batch.floors[self._members] * (factor * (1.0 - TOLERANCE))
        targets = floors[:, None] * self._seconds  # [members, counts]
        lengths = (self._expected[:, :, None] < targets[:, None, :]).sum(axis=1)
        feasible = (lengths <= self._tokens).all(axis=0) & (self._seconds <= self._longest)
        feasible &= lengths.sum(axis=0) <= np.arange(len(self._seconds))
        needed = np.zeros((self._batch.requests, len(self._seconds)), dtype=np.int64)
        needed[self._members] = lengths
        return needed, feasible


def _largest_factor(floors: _Floors) -> float:
    """1 when the floors can hold, otherwise the largest share of all of them that can."""
    if floors.needed(1.0)[1].any():
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(RELAXATIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if floors.needed(middle)[1].any() else (low, middle)
    return low


def _best_under(
    batch: PlanBatch, ranking: Ranking, total: float, seconds: Floats, needed: Ints, feasible: Bools
) -> Ints:
    """The best feasible count, its mandatory tokens and the best others -> lengths [requests].

    More seconds need more tokens of every floor, so counts whose needs have equal sums have equal
    needs: each of these groups is one pass over the other tokens.
    """
    sums = needed.sum(axis=0)
    best, lengths = -1.0, np.zeros(batch.requests, dtype=np.int64)
    for mandatory_count in np.unique(sums[feasible]):
        counts = (feasible & (sums == mandatory_count)).nonzero()[0]
        mandatory = needed[:, counts[0]]
        others = ranking.without(mandatory)
        start = total + float(((expected_tokens(batch, mandatory) - 1.0) * batch.weights).sum())
        tokens = start + np.concatenate(([0.0], np.cumsum(others.values)))
        throughput = tokens[counts - mandatory_count] / seconds[counts]
        winner = int(throughput.argmax())
        if throughput[winner] > best:
            best = float(throughput[winner])
            lengths = mandatory + others.lengths(int(counts[winner] - mandatory_count), batch.requests)
    return lengths
