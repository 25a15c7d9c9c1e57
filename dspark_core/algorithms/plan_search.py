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

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, rank, running_sums
from dspark_core.algorithms.prefix_scheduler import best_count
from dspark_core.algorithms.speed_floor import TOLERANCE, expected_tokens
from dspark_core.algorithms.step_surface import Floats

ROUNDING = 1e-12
"""Relative: what sums of the same numbers in another order may differ by."""
BOUND_ROUNDING = 1e-10
"""The same, of what is added and taken away again. The larger, the more is looked at in vain."""


def search(
    batch: PlanBatch,
    seconds: Floats,
    fixed: Ints | None = None,
    free: Bools | None = None,
    ranking: Ranking | None = None,
) -> Ints:
    """The best lengths of the `free` requests while the others keep `fixed` -> lengths [requests].

    Without the two all are free. Maximises tokens per second; of equal plans the one with fewer
    tokens. `seconds[n]` of the round with n draft tokens in all; `ranking` of what is free, if known already.
    """
    if fixed is None or free is None:
        held, free = np.zeros(batch.requests, dtype=np.int64), np.ones(batch.requests, dtype=np.bool_)
        kept, remaining = np.ones(batch.requests), seconds
    else:
        held = np.where(free, 0, fixed)
        kept, remaining = expected_tokens(batch, held), seconds[int(held.sum()) :]
    total = float(kept.sum())
    if batch.has_floors:
        return held + _best_under(batch, _Floors(batch, kept, remaining, free), total, ranking)
    ranking = ranking or _of_free(batch, free)
    return held + ranking.lengths(best_count(ranking, total, remaining))


def _of_free(batch: PlanBatch, free: Bools) -> Ranking:
    everyone = rank(batch)
    return everyone if free.all() else everyone.beyond(np.where(free, 0, everyone.block))


class _Floors:
    """How many tokens each floor needs, for every count of draft tokens in the round.

    A length holds its request's floor in rounds up to some seconds. All of these limits in order tell what
    any count needs: as many tokens as there are limits below the seconds of a round of that count.
    """

    def __init__(self, batch: PlanBatch, kept: Floats, seconds: Floats, free: Bools) -> None:
        self.free, everybody = free, bool(free.all())
        present = batch.columns if everybody else batch.columns[:, free]
        tokens = present.size - int(np.count_nonzero(np.signbit(present)))
        self.seconds = seconds = seconds[: tokens + 1]
        members = (batch.floors if everybody else batch.floors * free).nonzero()[0]
        expected, promised = batch.by_length, batch.floors * (1.0 - TOLERANCE)
        if len(members) < batch.requests:
            expected, promised = expected.take(members, axis=1), promised.take(members)
        # The shortest a round may get from each count on: the best a request can do with a length.
        shortest = _least_from_each(seconds, len(expected))
        fastest = np.maximum.reduce(expected[: len(shortest)] / shortest[:, None])
        limits = expected / promised
        within = fastest >= promised
        if not within.all():
            members, limits = members[within], limits[:, within]
        self._members, self._limits = members, limits  # [members]; [1 + block, members] seconds
        last = limits[-1].min(initial=np.inf)
        longest = np.inf if everybody else _given_seconds(batch, kept, free, float(seconds[0]))
        self._ordered = np.sort(self._limits, axis=None)
        # Relaxed by a factor, a count holds the floors while no more limits lie below than it has tokens.
        reached = np.full(len(seconds), np.inf)
        reached[: self._ordered.size] = self._ordered[: len(seconds)]
        possible = seconds <= longest
        factor = float((np.minimum(reached, last) / seconds).max(initial=0.0, where=possible))
        self._relaxed = relaxed = seconds * min(1.0, factor * (1.0 - ROUNDING))
        feasible = possible & (relaxed <= last) & (reached >= relaxed)
        self.counts: Ints = feasible.nonzero()[0]
        """Of draft tokens, that all floors can do with."""

    def needs(self) -> Ints:
        """How many tokens the floors need in rounds of each of the `counts` -> [counts]."""
        sums: Ints = self._ordered.searchsorted(self._relaxed.take(self.counts), side="left")
        return sums

    def needed_values(self, batch: PlanBatch, most: int) -> Floats:
        """Of the tokens that floors need, those of the shortest rounds first -> [most]"""
        limits = self._limits[:-1].ravel()
        values: Floats = batch.columns.take(self._members, axis=1)
        return values.ravel().take(limits.argsort(kind="stable")[:most])

    def needed(self, count: int) -> Ints:
        """Lengths [requests] that hold the floors in a round of `count` draft tokens."""
        lengths = np.zeros(len(self.free), dtype=np.int64)
        lengths[self._members] = (self._limits < self._relaxed[count]).sum(axis=0)
        return lengths


def _given_seconds(batch: PlanBatch, kept: Floats, free: Bools, shortest: float) -> float:
    """How long a round may get for requests with given lengths: floors that hold must go on to; others cannot
    be helped here."""
    given = (batch.floors * ~free).nonzero()[0]
    held = kept.take(given) / batch.floors.take(given) / (1.0 - TOLERANCE)
    return float(held[held >= shortest].min(initial=np.inf))


def _least_from_each(seconds: Floats, count: int) -> Floats:
    """The least of the seconds from each of the first `count` on -> [count], or as many as there are."""
    least = seconds[:count].copy()
    least[-1:] = np.minimum(least[-1:], seconds[count:].min(initial=np.inf))
    backwards: Floats = np.minimum.accumulate(least[::-1])
    return backwards[::-1]


def _best_under(batch: PlanBatch, floors: _Floors, total: float, ranking: Ranking | None) -> Ints:
    """The best feasible count, its mandatory tokens and the best others -> lengths [requests].

    More seconds need more tokens of every floor, so counts whose needs have equal sums have equal needs:
    each of these groups is one pass over the other tokens. Few groups need one, as none is better than its
    bound: a count's best tokens without floors to begin with, and less with every group that was looked at.
    """
    counts, sums = floors.counts, floors.needs()
    if counts.size == 1 and counts[0] == sums[0]:  # as where floors are relaxed: none is left to choose
        return floors.needed(int(counts[0]))
    ranking = ranking or _of_free(batch, floors.free)
    seconds = floors.seconds.take(counts)
    bounds = (total + running_sums(ranking.values)).take(counts) / seconds
    best, best_sum, lengths = -1.0, 0, np.zeros(batch.requests, dtype=np.int64)
    needed_values: Floats | None = None
    while counts.size:
        likeliest = int(bounds.argmax())
        if bounds[likeliest] < 0.0 or bounds[likeliest] * (1.0 + BOUND_ROUNDING) < best:
            break
        needed = int(sums[likeliest])
        group = (sums == needed).nonzero()[0]
        mandatory = floors.needed(int(counts[likeliest]))
        others = ranking.beyond(mandatory)
        start = total + float((expected_tokens(batch, mandatory) - 1.0).sum())
        throughput = (start + running_sums(others.values)).take(counts.take(group) - needed)
        throughput /= seconds.take(group)
        winner = int(throughput.argmax())
        reached, more = float(throughput[winner]), int(counts[group[winner]]) - needed
        if reached > best or (reached == best and needed < best_sum):
            best, best_sum, lengths = reached, needed, mandatory + others.lengths(more)
        bounds[group] = -1.0
        if float(bounds.max()) * (1.0 + BOUND_ROUNDING) < best:
            break
        if needed_values is None:
            needed_values = floors.needed_values(batch, int(sums.max()))
        least = float(others.values[more - 1]) if more else float(others.values[:1].max(initial=0.0))
        worth = total + _worth(ranking.values, needed_values, least, counts, sums)
        np.minimum(bounds, worth / seconds, out=bounds)
    return lengths


def _worth(values: Floats, needed: Floats, least: float, counts: Ints, sums: Ints) -> Floats:
    """No plan's draft tokens are worth more, with so many in all and so many of the `needed` -> [counts].

    Each token counts `least`, whichever it is, and what it is worth beyond that; the needed ones that are
    worth less take it away. A tight bound where `least` is the worth of the last token that is not needed.
    """
    beyond = float(np.maximum(values - least, 0.0).sum())
    return beyond + counts * least - running_sums(np.maximum(least - needed, 0.0)).take(sums)
