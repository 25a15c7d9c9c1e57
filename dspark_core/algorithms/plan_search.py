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

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, accumulated, rank, running_sums
from dspark_core.algorithms.prefix_scheduler import best_count
from dspark_core.algorithms.speed_floor import TOLERANCE, expected_tokens
from dspark_core.algorithms.step_surface import Floats

ROUNDING = 1e-12
"""Relative: what sums of the same numbers in another order may differ by."""


def search(
    batch: PlanBatch,
    seconds: Floats,
    fixed: Ints | None = None,
    free: Bools | None = None,
    ranking: Ranking | None = None,
) -> Ints:
    """The best lengths of the `free` requests while the others keep `fixed` -> lengths [requests].

    Without the two all are free. Maximises weighted tokens per second; of equal plans the one with fewer
    tokens. `seconds[n]` of the round with n draft tokens in all; `ranking` of what is free, if known already.
    """
    if fixed is None or free is None:
        ranking = ranking or rank(batch)
        held, free = np.zeros(batch.requests, dtype=np.int64), np.ones(batch.requests, dtype=np.bool_)
        kept, remaining = np.ones(batch.requests), seconds
    else:
        ranking = ranking or rank(batch).beyond(np.where(free, 0, batch.survival.shape[1]))
        held = np.where(free, 0, fixed)
        kept, remaining = expected_tokens(batch, held), seconds[int(held.sum()) :]
    total = float(kept @ batch.weights)
    if not batch.has_floors:
        return held + ranking.lengths(best_count(ranking, total, remaining))
    floors = _Floors(batch, kept, remaining[: len(ranking.values) + 1], free)
    return held + _best_under(batch, ranking, total, floors)


class _Floors:
    """How many tokens each floor needs, for every count of draft tokens in the round.

    A length holds its request's floor in rounds up to some seconds. All of these limits in order tell what
    any count needs: as many tokens as there are limits below the seconds of a round of that count.
    """

    def __init__(self, batch: PlanBatch, kept: Floats, seconds: Floats, free: Bools) -> None:
        self._requests = batch.requests
        members = (free & (batch.floors > 0)).nonzero()[0]
        rows = batch.survival.take(members, axis=0).T
        expected = np.concatenate((np.ones((1, len(members))), np.maximum(rows, 0.0)))
        accumulated(np.add, expected)  # [1 + block, members] by length
        # The shortest a round may get from each count on: the best a request can do with a length.
        shortest = _least_from_each(seconds, len(expected))
        fastest = np.maximum.reduce(expected[: len(shortest)] / shortest[:, None])
        within = (fastest >= batch.floors.take(members) * (1.0 - TOLERANCE)).nonzero()[0]
        self._members = members.take(within)
        promised = batch.floors.take(self._members) * (1.0 - TOLERANCE)
        self._limits = expected.take(within, axis=1) / promised  # [1 + block, members] seconds
        last = self._limits[-1].min(initial=np.inf)
        # Requests with given lengths: floors that hold must go on to; others cannot be helped here.
        given = ~free & (batch.floors > 0)
        held = kept[given] / batch.floors[given] / (1.0 - TOLERANCE)
        longest = held[held >= seconds[0]].min(initial=np.inf)
        ordered = np.sort(self._limits, axis=None)
        # Relaxed by a factor, a count holds the floors while no more limits lie below than it has tokens.
        reached = np.full(len(seconds), np.inf)
        reached[: len(ordered)] = ordered[: len(seconds)]
        factors = np.where(seconds <= longest, np.minimum(reached, last) / seconds, 0.0)
        self.seconds = seconds
        self._relaxed = seconds * min(1.0, float(factors.max()) * (1.0 - ROUNDING))
        self.sums = ordered.searchsorted(self._relaxed, side="left")
        """Tokens that floors need, by count."""
        self.feasible = (
            (self._relaxed <= last) & (seconds <= longest) & (self.sums <= np.arange(len(seconds)))
        )

    def needed(self, count: int) -> Ints:
        """Lengths [requests] that hold the floors in a round of `count` draft tokens."""
        lengths = np.zeros(self._requests, dtype=np.int64)
        lengths[self._members] = (self._limits < self._relaxed[count]).sum(axis=0)
        return lengths


def _least_from_each(seconds: Floats, count: int) -> Floats:
    """The least of the seconds from each of the first `count` on -> [count], or as many as there are."""
    least = seconds[:count].copy()
    least[-1:] = np.minimum(least[-1:], seconds[count:].min(initial=np.inf))
    backwards: Floats = np.minimum.accumulate(least[::-1])
    return backwards[::-1]


def _best_under(batch: PlanBatch, ranking: Ranking, total: float, floors: _Floors) -> Ints:
    """The best feasible count, its mandatory tokens and the best others -> lengths [requests].

    More seconds need more tokens of every floor, so counts whose needs have equal sums have equal needs:
    each of these groups is one pass over the other tokens. No plan of a count is better than its best tokens
    without floors, so most groups need not be looked at.
    """
    counts = floors.feasible.nonzero()[0]
    sums = floors.sums.take(counts)
    bounds = (total + running_sums(ranking.values)).take(counts) / floors.seconds.take(counts)
    bound_of = np.full(int(sums.max(initial=-1)) + 1, -1.0)
    np.maximum.at(bound_of, sums, bounds)
    best, best_sum, lengths = -1.0, 0, np.zeros(batch.requests, dtype=np.int64)
    for _ in range(len(bound_of)):
        mandatory_count = int(bound_of.argmax())
        if bound_of[mandatory_count] < 0.0 or bound_of[mandatory_count] * (1.0 + ROUNDING) < best:
            break
        bound_of[mandatory_count] = -1.0
        mine = counts[sums == mandatory_count]
        mandatory = floors.needed(int(mine[0]))
        others = ranking.beyond(mandatory)
        start = total + float(((expected_tokens(batch, mandatory) - 1.0) * batch.weights).sum())
        tokens = start + running_sums(others.values)
        throughput = tokens.take(mine - mandatory_count) / floors.seconds.take(mine)
        winner = int(throughput.argmax())
        reached = float(throughput[winner])
        if reached > best or (reached == best and mandatory_count < best_sum):
            best, best_sum = reached, mandatory_count
            lengths = mandatory + others.lengths(int(mine[winner] - mandatory_count))
    return lengths
