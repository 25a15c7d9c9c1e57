"""Finds the optimal plan under speed floors, whatever the shape of the step times.

It looks at the whole round, so it may plan only requests whose lengths cannot bias their output
(coupled and greedy acceptance) and past rounds (`delayed_scheduler`). For a given number
of draft tokens the best choice is greedy: what the floors need, then the tokens most likely to
survive; so it suffices to try every number. A floor that its request cannot reach with any length,
even alone, is ignored. If the others cannot all hold, they are relaxed by the smallest common factor
that suffices.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, rank, running_sums
from dspark_core.algorithms.prefix_scheduler import best_count
from dspark_core.algorithms.speed_floor import TOLERANCE, expected_tokens
from dspark_core.algorithms.step_surface import Floats

ROUNDING = 1e-12
"""Relative error allowed for sums of the same numbers in a different order."""
BOUND_ROUNDING = 1e-10
"""The same for sums with cancellation. A larger value causes more groups to be examined in vain."""


def search(
    batch: PlanBatch,
    seconds: Floats,
    fixed: Ints | None = None,
    free: Bools | None = None,
    ranking: Ranking | None = None,
) -> Ints:
    """The best lengths of the `free` requests while the others keep `fixed` -> lengths [requests].

    If either is None, all requests are free. Maximises tokens per second; among equal plans takes the one
    with fewer tokens. `seconds[n]`: time of a round with n draft tokens in total; `ranking`: that of the free
    tokens, if already computed.
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
    """How many tokens the floors need, for every number of draft tokens in the round.

    Each length holds its request's floor in rounds up to some duration, its limit. With all limits
    sorted, the tokens needed in a round are the number of limits below its duration.
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
        # Shortest round with at least as many tokens: the best case for a request at a given length.
        shortest = _suffix_minima(seconds, len(expected))
        fastest = np.maximum.reduce(expected[: len(shortest)] / shortest[:, None])
        limits = expected / promised
        within = fastest >= promised
        if not within.all():
            members, limits = members[within], limits[:, within]
        self._members, self._limits = members, limits  # [members]; [1 + block, members] seconds
        last = limits[-1].min(initial=np.inf)
        longest = np.inf if everybody else _given_seconds(batch, kept, free, float(seconds[0]))
        self._ordered = np.sort(self._limits, axis=None)
        # With relaxed floors, a count is feasible if at most that many limits lie below its round's duration.
        reached = np.full(len(seconds), np.inf)
        reached[: self._ordered.size] = self._ordered[: len(seconds)]
        possible = seconds <= longest
        factor = float((np.minimum(reached, last) / seconds).max(initial=0.0, where=possible))
        self._relaxed = relaxed = seconds * min(1.0, factor * (1.0 - ROUNDING))
        feasible = possible & (relaxed <= last) & (reached >= relaxed)
        self.counts: Ints = feasible.nonzero()[0]
        """Draft token counts with which all floors can hold."""

    def needs(self) -> Ints:
        """Tokens that the floors need in a round of each of the `counts` -> [counts]."""
        sums: Ints = self._ordered.searchsorted(self._relaxed.take(self.counts), side="left")
        return sums

    def needed_values(self, batch: PlanBatch, most: int) -> Floats:
        """Survival of the tokens that floors need, those with the smallest limits first -> [most]."""
        limits = self._limits[:-1].ravel()
        values: Floats = batch.columns.take(self._members, axis=1)
        return values.ravel().take(limits.argsort(kind="stable")[:most])

    def needed(self, count: int) -> Ints:
        """Lengths [requests] that hold the floors in a round of `count` draft tokens."""
        lengths = np.zeros(len(self.free), dtype=np.int64)
        lengths[self._members] = (self._limits < self._relaxed[count]).sum(axis=0)
        return lengths


def _given_seconds(batch: PlanBatch, kept: Floats, free: Bools, shortest: float) -> float:
    """Longest round in which the floors of requests with fixed lengths go on holding. Floors that do not hold
    in the shortest round are ignored."""
    given = (batch.floors * ~free).nonzero()[0]
    held = kept.take(given) / batch.floors.take(given) / (1.0 - TOLERANCE)
    return float(held[held >= shortest].min(initial=np.inf))


def _suffix_minima(seconds: Floats, count: int) -> Floats:
    """Suffix minima of `seconds` at the first `count` indices -> [count], or fewer if it is shorter."""
    least = seconds[:count].copy()
    least[-1:] = np.minimum(least[-1:], seconds[count:].min(initial=np.inf))
    backwards: Floats = np.minimum.accumulate(least[::-1])
    return backwards[::-1]


def _best_under(batch: PlanBatch, floors: _Floors, total: float, ranking: Ranking | None) -> Ints:
    """The best feasible count, with its mandatory tokens and the best others -> lengths [requests].

    A longer round needs more tokens for every floor, so counts whose needs have equal sums have equal needs:
    each such group takes one pass over the other tokens. Groups whose bound is below the best are skipped; a
    bound starts as the throughput without floors and tightens with every group that is examined.
    """
    counts, sums = floors.counts, floors.needs()
    if counts.size == 1 and counts[0] == sums[0]:  # e.g. with relaxed floors: nothing left to choose
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
    """Upper bound on the survival sum of any plan with `counts` tokens, `sums` of them needed -> [counts].

    Every token counts as `least` plus its excess over it, less the deficit of needed tokens that are
    worth less. The bound is tight if `least` is the value of the last token that is not needed.
    """
    beyond = float(np.maximum(values - least, 0.0).sum())
    return beyond + counts * least - running_sums(np.maximum(least - needed, 0.0)).take(sums)
