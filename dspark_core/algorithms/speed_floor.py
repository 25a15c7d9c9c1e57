"""Speed floors: a request's expected tokens per round over the round's seconds is at least its floor.

Floors come first, throughput after. Everything here decides token by token and looks at no token
before it decides on it, so it may plan rejection sampling. `plan_search` knows floors too, for
requests that may look ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, accumulated, rank
from dspark_core.algorithms.prefix_scheduler import admit_while_rising, following_values, one_more_pays
from dspark_core.algorithms.step_surface import Floats

TOLERANCE = 1e-9
"""Relative: a floor that holds exactly must not fail by rounding."""
RANKED = 1e-6
"""Relative: survival that differs by less may rank as equal."""


def expected_tokens(batch: PlanBatch, lengths: Ints) -> Floats:
    """Tokens each request commits in expectation, the bonus token included -> [requests]."""
    tokens: Floats = batch.by_length[np.minimum(lengths, batch.survival.shape[1]), np.arange(batch.requests)]
    return tokens


def unmet_floors(batch: PlanBatch, lengths: Ints, seconds: float) -> tuple[int, ...]:
    short = expected_tokens(batch, lengths) < batch.floors * seconds * (1.0 - TOLERANCE)
    return tuple(int(index) for index in short.nonzero()[0])


def admit_floors(batch: PlanBatch, seconds: Floats, judged_at: float = 0.0) -> Ints:
    """Tokens that floors need -> lengths [requests]; `seconds[n]` of the round with n draft tokens.

    The request that is furthest behind goes first. It stops when its floor holds, when its tokens
    end, when one more would not make it any faster, or when its floor is out of reach (`_reach`).
    `judged_at`: seconds the round is known beforehand to take at least, tokens of others included.
    """
    lengths = np.zeros(batch.requests, dtype=np.int64)
    members = batch.floors.nonzero()[0]
    if not members.size or batch.survival.shape[1] == 0:
        return lengths
    if 1.0 / (batch.floors.max() * (1.0 - TOLERANCE)) >= max(seconds[0], judged_at):
        return lengths  # not even the furthest behind is
    needs = _Needs.of(batch, members[batch.granted[members].argsort(kind="stable")])
    asked_for = members.size * batch.survival.shape[1]
    times = np.maximum(seconds[: asked_for + 1], judged_at)
    level = times.min() == times.max()
    lengths[needs.members] = needs.at(float(times[0]), len(times) - 1) if level else _in_turn(needs, times)
    return lengths


@dataclass(frozen=True, slots=True)
class _Needs:
    """Of every token of requests with floors, [block, members]: what is done along short rows takes several
    times as long."""

    members: Ints
    """[members] of equal urgency the first goes first."""
    present: Bools
    holds: Floats
    """In a round of so many seconds the floor holds without the token;"""
    reaches: Floats
    """of more than so many it is out of reach with all that follow."""
    gains: Floats
    """How many times as many tokens the request has with the token."""

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
        """Tokens of each member, at most so many, in a round that takes so long however many there are."""
        goes_on = self.present & (self.holds < seconds) & (self.gains > 1.0) & (self.reaches >= seconds)
        accumulated(np.logical_and, goes_on)
        lengths: Ints = goes_on.sum(axis=0)
        if lengths.sum() > most:  # the order decides only where there is no room for all
            lengths = np.bincount(self.in_order(goes_on)[:most] // len(goes_on), minlength=len(self.members))
        return lengths

    def in_order(self, tokens: Bools) -> Ints:
        """Some of the tokens, who is furthest behind first -> [tokens] member * block + position."""
        chosen = tokens.T.ravel().nonzero()[0]
        return chosen.take(self.holds.T.ravel().take(chosen).argsort(kind="stable"))


def _in_turn(needs: _Needs, times: Floats) -> Ints:
    """Token by token, as each makes the round longer for all -> lengths [members]."""
    # Who holds in the longest round is not behind in any.
    order = needs.in_order(needs.present & (needs.holds < times.max()))
    holds, reaches, gains = (one.T.ravel().take(order) for one in (needs.holds, needs.reaches, needs.gains))
    members, longer = order // len(needs.holds), times[1:] / times[:-1]
    # Until one is refused, as many were granted as came before.
    likely = min(len(order), len(longer))
    behind, reached = holds[:likely] < times[:likely], reaches[:likely] >= times[:likely]
    granted = behind & reached & (gains[:likely] > longer[:likely])
    first = likely if granted.all() else int(granted.argmin())
    lengths: Ints = np.bincount(members[:first], minlength=len(needs.members))
    if first == likely or not behind[first]:
        return lengths
    columns = (one[first:].tolist() for one in (members, holds, reaches, gains))
    return lengths + _one_by_one(zip(*columns, strict=True), times[first:], longer[first:], len(lengths))


def _one_by_one(
    waiting: Iterator[tuple[int, float, float, float]], times: Floats, longer: Floats, members: int
) -> Ints:
    """For each token its member, and what it `holds`, `reaches` and `gains` -> lengths [members]."""
    granted, stopped = [0] * members, [False] * members
    for now, ratio in zip(times[:-1].tolist(), longer.tolist(), strict=True):
        for member, holds, reaches, gains in waiting:
            if stopped[member]:
                continue
            if holds >= now:
                return np.array(granted)  # the furthest behind is not behind
            if gains > ratio and reaches >= now:
                granted[member] += 1
                break
            stopped[member] = True
        else:
            break  # no token is left
    return np.array(granted)


def _reach(survival: Floats, present: Bools) -> Floats:
    """Of every token, what it and all after it bring if each is as likely, given the one before it, as
    the likeliest so far -> [block, members]. What follows the token is not looked at but for its number.
    """
    likeliest = np.zeros_like(survival)
    likeliest[0] = survival[0]
    np.divide(survival[1:], survival[:-1], out=likeliest[1:], where=survival[:-1] > 0.0)
    accumulated(np.maximum, likeliest)
    np.minimum(likeliest, 1.0, out=likeliest)
    series, whole = np.ones_like(survival), bool(present.all())
    for more in range(1, len(survival)):  # one token more for all that have as many left
        longer = likeliest[:-more] * series[:-more]
        longer += 1.0
        if whole:
            series[:-more] = longer
        else:
            np.copyto(series[:-more], longer, where=present[more:])
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
    """Goes on from `lengths`, best tokens of `candidates` [requests] first, and stops where a floor that
    holds would break. Also where one more token would not raise throughput (Algorithm 1), unless it is
    told how many draft tokens the round shall have at `most`. `ranking`: of the batch, where it is known.
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
    """How many tokens of the ranking can be added to `lengths`, which give each request what is `expected`
    [requests]; `seconds[n]` of the round with n of them.

    A floor allows a round so many seconds, and more from each token of its own on. Up to the first
    round that is too long all were allowed, so that is where the running maximum passes an allowance.
    """
    count, block = len(ranking.values), batch.survival.shape[1]
    if not count:
        return 0
    longest = np.maximum.accumulate(seconds[: count + 1])
    holding = (batch.floors > 0) & (expected >= batch.floors * seconds[0] * (1.0 - TOLERANCE))
    # Those that hold in the longest of the rounds, without more tokens, break in none.
    members = (holding & (expected < batch.floors * longest[-1])).nonzero()[0]
    if not members.size:
        return count
    allowed = batch.by_length.take(members, axis=1) / batch.floors.take(members) * (1.0 + TOLERANCE)
    passed = longest.searchsorted(allowed, side="right")  # [1 + block, members]
    # With how many tokens of the ranking a length ends, as the next is added.
    until = np.full((1 + block, len(lengths)), count + 1)
    until[ranking.positions, ranking.requests] = np.arange(1, count + 1)
    breaks = passed < until.take(members, axis=1)
    breaks &= np.arange(1 + block)[:, None] >= lengths.take(members)
    return max(int(passed[breaks].min(initial=count + 1)) - 1, 0)


def _one_breaks_a_floor(batch: PlanBatch, following: Floats, expected: Floats, seconds: Floats) -> bool:
    """Whether one more token does, which is told without ranking them all. `following` [requests]: what
    each request's next token is worth; the rest as above."""
    now, then = float(seconds[0]), float(seconds[:2].max())
    holding = expected >= batch.floors * now * (1.0 - TOLERANCE)
    holding &= expected * (1.0 + TOLERANCE) < batch.floors * then * (1.0 - TOLERANCE)
    breaking = holding.nonzero()[0]
    if breaking.size != 1:
        return breaking.size > 1
    # Unless the token is its own, which it is not if another's is likelier.
    return float(following.max()) > float(following[breaking[0]]) * (1.0 + RANKED)
