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
    tokens. `seconds[n]` of the round with n draft tokens in all; `ranking` of the batch, where it is known.
    """
    ranking = ranking or rank(batch)
    if fixed is None or free is None:
        held, free = np.zeros(batch.requests, dtype=np.int64), np.ones(batch.requests, dtype=np.bool_)
        kept, remaining = np.ones(batch.requests), seconds
    else:
        held = np.where(free, 0, fixed)
        kept, remaining = expected_tokens(batch, held), seconds[int(held.sum()) :]
        ranking = ranking.beyond(np.where(free, 0, batch.survival.shape[1]))
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
        rows = batch.survival[members]
        gains = np.concatenate((np.ones((len(rows), 1)), np.maximum(rows, 0.0)), axis=1)
        expected = np.cumsum(gains, axis=1)  # [members, 1 + block] by length
        # The shortest a round may get from each count on: the best a request can do with a length.
        shortest = np.minimum.accumulate(seconds[::-1])[::-1][: expected.shape[1]]
        fastest = (expected[:, : len(shortest)] / shortest).max(axis=1, initial=0.0)
        within = fastest >= batch.floors[members] * (1.0 - TOLERANCE)
        self._members = members[within]
        promised = batch.floors[self._members, None] * (1.0 - TOLERANCE)
        self._limits = expected[within] / promised  # [members, 1 + block] seconds
        last = self._limits[:, -1].min(initial=np.inf)
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
        lengths[self._members] = (self._limits < self._relaxed[count]).sum(axis=1)
        return lengths


def _best_under(batch: PlanBatch, ranking: Ranking, total: float, floors: _Floors) -> Ints:
    """The best feasible count, its mandatory tokens and the best others -> lengths [requests].

    More seconds need more tokens of every floor, so counts whose needs have equal sums have equal needs:
    each of these groups is one pass over the other tokens. No plan of a count is better than its best tokens
    without floors, so most groups need not be looked at.
    """
    counts = floors.feasible.nonzero()[0]
    bounds = (total + np.concatenate(([0.0], np.cumsum(ranking.values))))[counts] / floors.seconds[counts]
    sums, group = np.unique(floors.sums[counts], return_inverse=True)
    bound_of = np.zeros(len(sums))
    np.maximum.at(bound_of, group, bounds)
    whose, nth = ranking.requests, ranking.positions
    best, best_sum, lengths = -1.0, 0, np.zeros(batch.requests, dtype=np.int64)
    for index in np.argsort(-bound_of, kind="stable").tolist():
        if bound_of[index] * (1.0 + ROUNDING) < best:
            break
        mandatory_count, mine = int(sums[index]), counts[group == index]
        mandatory = floors.needed(int(mine[0]))
        kept = nth >= mandatory[whose]
        others = Ranking(ranking.places[kept], ranking.values[kept], ranking.order)
        start = total + float(((expected_tokens(batch, mandatory) - 1.0) * batch.weights).sum())
        tokens = start + np.concatenate(([0.0], np.cumsum(others.values)))
        throughput = tokens[mine - mandatory_count] / floors.seconds[mine]
        winner = int(throughput.argmax())
        reached = float(throughput[winner])
        if reached > best or (reached == best and mandatory_count < best_sum):
            best, best_sum = reached, mandatory_count
            lengths = mandatory + others.lengths(int(mine[winner] - mandatory_count))
    return lengths
