"""Speed floors: a request's expected tokens per round, over the round's seconds, must reach its floor.

Floors come first, throughput after. Everything here decides token by token without looking at later
tokens, so it may plan rejection sampling. `plan_search` handles floors for requests that may
look ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, accumulated, rank
from dspark_core.algorithms.prefix_scheduler import admit_while_rising, following_values, one_more_pays
from dspark_core.algorithms.step_surface import Floats

TOLERANCE = 1e-9
"""Relative: a floor that holds exactly must not fail because of rounding."""
RANKED = 1e-6
"""Relative: survivals that differ by less may rank as equal."""


def expected_tokens(batch: PlanBatch, lengths: Ints) -> Floats:
    """Expected committed tokens of each request, bonus token included -> [requests]."""
    tokens: Floats = batch.by_length[np.minimum(lengths, batch.survival.shape[1]), np.arange(batch.requests)]
    return tokens


def unmet_floors(batch: PlanBatch, lengths: Ints, seconds: float) -> tuple[int, ...]:
    short = expected_tokens(batch, lengths) < batch.floors * seconds * (1.0 - TOLERANCE)
    return tuple(int(index) for index in short.nonzero()[0])


def admit_floors(batch: PlanBatch, seconds: Floats, judged_at: float = 0.0) -> Ints:
    """Tokens that floors need -> lengths [requests]; `seconds[n]`: time of a round with n draft tokens.

    The request furthest behind its floor goes first. It stops when its floor holds, when it has no more
    tokens, when one more would not make it faster, or when its floor is out of reach (`_reach`).
    `judged_at`: minimum duration of the round known in advance, including other requests' tokens.
    """
    lengths = np.zeros(batch.requests, dtype=np.int64)
    members = batch.floors.nonzero()[0]
    if not members.size or batch.survival.shape[1] == 0:
        return lengths
    if 1.0 / (batch.floors.max() * (1.0 - TOLERANCE)) >= max(seconds[0], judged_at):
        return lengths  # even the highest floor holds
    needs = _Needs.of(batch, members[batch.granted[members].argsort(kind="stable")])
    asked_for = members.size * batch.survival.shape[1]
    times = np.maximum(seconds[: asked_for + 1], judged_at)
    shortest, longest = float(times.min()), float(times.max())
    if shortest == longest:
        lengths[needs.members] = needs.at(shortest, len(times) - 1)
    else:
        lengths[needs.members] = _in_turn(needs, times, shortest, longest)
    return lengths


@dataclass(frozen=True, slots=True)
class _Needs:
    """Values per token of requests with floors, [block, members]: short rows would be much slower."""

    members: Ints
    """[members] requests; on equal urgency the first goes first."""
    present: Bools
    holds: Floats
    """Round duration up to which the floor holds without the token."""
    reaches: Floats
    """Round duration above which the floor is out of reach even with all later tokens."""
    gains: Floats
    """Ratio of the request's expected tokens with and without the token."""

    @classmethod
    def of(cls, batch: PlanBatch, members: Ints) -> _Needs:
        rows, by_length = batch.columns.take(members, axis=1), batch.by_length.take(members, axis=1)
        promised = batch.floors.take(members) * (1.0 - TOLERANCE)
        present, expected = rows >= 0.0, by_length[:-1]
        return cls(
            members=members,
            present=present,
            holds=expected / promised,
            reaches=(expected + _reach(np.maximum(rows, 0.0), present)) / promised,
            gains=by_length[1:] / expected,
        )

    def at(self, seconds: float, most: int) -> Ints:
        """Tokens of each member, at most `most`, if the round's duration does not depend on their number."""
        goes_on = self.present & (self.holds < seconds) & (self.gains > 1.0) & (self.reaches >= seconds)
        accumulated(np.logical_and, goes_on)
        lengths: Ints = goes_on.sum(axis=0)
        if lengths.sum() > most:  # the order matters only if not all fit
            lengths = np.bincount(self.in_order(goes_on)[:most] // len(goes_on), minlength=len(self.members))
        return lengths

    def in_order(self, tokens: Bools) -> Ints:
        """The chosen tokens, furthest behind first -> [tokens] member * block + position."""
        chosen = tokens.T.ravel().nonzero()[0]
        return chosen.take(self.holds.T.ravel().take(chosen).argsort(kind="stable"))


def _in_turn(needs: _Needs, times: Floats, shortest: float, longest: float) -> Ints:
    """Decides token by token, as each one lengthens the round for all -> lengths [members]. `shortest` and
    `longest` of `times`."""
    # A token whose floor holds in the longest round is never needed; one whose floor is out of reach in the
    # shortest is refused, and its request gets no more.
    possible = needs.present & (needs.holds < longest) & (needs.reaches >= shortest)
    accumulated(np.logical_and, possible)
    order = needs.in_order(possible)
    holds, reaches, gains = (one.T.ravel().take(order) for one in (needs.holds, needs.reaches, needs.gains))
    members, longer = order // len(needs.holds), times[1:] / times[:-1]
    # Until the first refusal, the number granted equals the index.
    likely = min(len(order), len(longer))
    behind, reached = holds[:likely] < times[:likely], reaches[:likely] >= times[:likely]
    granted = behind & reached & (gains[:likely] > longer[:likely])
    first = likely if granted.all() else int(granted.argmin())
    lengths: Ints = np.bincount(members[:first], minlength=len(needs.members))
    if first == likely or not behind[first]:
        return lengths
    columns = (one[first:].tolist() for one in (members, holds, reaches, gains))
    within = slice(first, likely)  # no more are granted than there are tokens
    return lengths + _one_by_one(zip(*columns, strict=True), times[within], longer[within], len(lengths))


def _one_by_one(
    waiting: Iterator[tuple[int, float, float, float]], times: Floats, longer: Floats, members: int
) -> Ints:
    """`waiting`: for each token its member, `holds`, `reaches` and `gains` -> lengths [members]."""
    granted, stopped = [0] * members, [False] * members
    for now, ratio in zip(times.tolist(), longer.tolist(), strict=True):
        for member, holds, reaches, gains in waiting:
            if stopped[member]:
                continue
            if holds >= now:
                return np.array(granted)  # even the furthest behind holds its floor
            if gains > ratio and reaches >= now:
                granted[member] += 1
                break
            stopped[member] = True
        else:
            break  # no tokens left
    return np.array(granted)


def _reach(survival: Floats, present: Bools) -> Floats:
    """Expected tokens from each token on if each later one is as likely, given the one before it, as
    the likeliest so far -> [block, members]. Only the number of later tokens is used, not their values.
    """
    likeliest = np.zeros_like(survival)
    likeliest[0] = survival[0]
    np.divide(survival[1:], survival[:-1], out=likeliest[1:], where=survival[:-1] > 0.0)
    accumulated(np.maximum, likeliest)
    np.minimum(likeliest, 1.0, out=likeliest)
    series, whole = np.ones_like(survival), bool(present.all())
    for more in range(1, len(survival)):  # adds one term for every token that many others follow
        terms = series[:-more] if whole else series[:-more].copy()
        terms *= likeliest[:-more]
        terms += 1.0
        if not whole:
            np.copyto(series[:-more], terms, where=present[more:])
    series *= survival
    return series


def admit_within_floors(
    batch: PlanBatch,
    lengths: Ints,
    candidates: Bools,
    seconds: Floats,
    *,
    most: int | None = None,
    ranking: Ranking | None = None,
) -> Ints:
    """Extends `lengths` by the best tokens of `candidates` [requests], stopping before a floor that
    holds would break. Without `most` it also stops when one more token does not raise throughput
    (Algorithm 1); otherwise the round is filled up to `most` draft tokens. `ranking`: that of the batch, if
    already computed.
    """
    used = int(lengths.sum())
    remaining = seconds[used:]
    room = len(remaining) - 1 if most is None else min(most - used, len(remaining) - 1)
    if room < 1:
        return lengths
    expected = expected_tokens(batch, lengths)
    total = float(expected.sum())
    following = following_values(batch, lengths, candidates)
    if most is None and not one_more_pays(following, total, remaining):
        return lengths
    if _one_breaks_a_floor(batch, following, expected, remaining):
        return lengths
    ranking = (ranking or rank(batch)).beyond(np.where(candidates, lengths, batch.survival.shape[1]))
    count = room if most is not None else admit_while_rising(ranking, total, remaining)
    ranking = ranking.first(count)
    return lengths + ranking.lengths(_before_a_floor_breaks(batch, lengths, expected, ranking, remaining))


def _before_a_floor_breaks(
    batch: PlanBatch, lengths: Ints, expected: Floats, ranking: Ranking, seconds: Floats
) -> int:
    """How many tokens of the ranking can be added to `lengths`; `expected` [requests] is what those
    lengths commit, `seconds[n]` the time of a round with n more tokens.

    A floor allows a certain round duration, which grows with each token of its own request. All rounds before
    the first that is too long were allowed, so that is where the running maximum exceeds an allowance.
    """
    count, block = len(ranking.values), batch.survival.shape[1]
    if not count:
        return 0
    longest = np.maximum.accumulate(seconds[: count + 1])
    holding = (batch.floors > 0) & (expected >= batch.floors * seconds[0] * (1.0 - TOLERANCE))
    # Floors that hold in the longest round without more tokens break in none.
    members = (holding & (expected < batch.floors * longest[-1])).nonzero()[0]
    if not members.size:
        return count
    allowed = batch.by_length.take(members, axis=1) / batch.floors.take(members) * (1.0 + TOLERANCE)
    passed = longest.searchsorted(allowed, side="right")  # [1 + block, members]
    # The count at which a length ends because the request's next token is added.
    until = np.full((1 + block, len(lengths)), count + 1)
    until[ranking.positions, ranking.requests] = np.arange(1, count + 1)
    breaks = passed < until.take(members, axis=1)
    breaks &= np.arange(1 + block)[:, None] >= lengths.take(members)
    return max(int(passed[breaks].min(initial=count + 1)) - 1, 0)


def _one_breaks_a_floor(batch: PlanBatch, following: Floats, expected: Floats, seconds: Floats) -> bool:
    """Whether one more token breaks a floor, without ranking all tokens. `following` [requests]: survival of
    each request's next token; the rest as above."""
    now, then = float(seconds[0]), float(seconds[:2].max())
    holding = expected >= batch.floors * now * (1.0 - TOLERANCE)
    holding &= expected * (1.0 + TOLERANCE) < batch.floors * then * (1.0 - TOLERANCE)
    breaking = holding.nonzero()[0]
    if breaking.size != 1:
        return breaking.size > 1
    # Unless that token is its own, which it is not if another's is likelier.
    return float(following.max()) > float(following[breaking[0]]) * (1.0 + RANKED)
