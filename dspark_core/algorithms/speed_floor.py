"""Speed floors: a request's expected tokens per round over the round's seconds is at least its floor.

Floors come first, throughput after. Everything here decides token by token and looks at no token
before it decides on it, so it may plan rejection sampling. `plan_search` knows floors too, for
requests that may look ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking
from dspark_core.algorithms.prefix_scheduler import admit_while_rising
from dspark_core.algorithms.step_surface import Floats

TOLERANCE = 1e-9
"""Relative: a floor that holds exactly must not fail by rounding."""


def expected_tokens(batch: PlanBatch, lengths: Ints) -> Floats:
    """Tokens each request commits in expectation, the bonus token included -> [requests]."""
    if batch.survival.shape[1] == 0:
        return np.ones(batch.requests)
    admitted = np.arange(batch.survival.shape[1]) < lengths[:, None]
    tokens: Floats = 1.0 + np.where(admitted, batch.survival, 0.0).sum(axis=1)
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
    needs = _Needs.of(batch, members[np.argsort(batch.granted[members], kind="stable")])
    times = np.maximum(seconds, judged_at)
    if times.min() == times.max():  # then the order decides only where there is no room for all
        at_once = needs.at(float(times[0]))
        if at_once.sum() < len(times):
            lengths[needs.members] = at_once
            return lengths
    return _in_turn(needs, times, lengths)


@dataclass(frozen=True, slots=True)
class _Needs:
    """Of every token of requests with floors, [members, block]."""

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
        rows, promised = batch.survival[members], batch.floors[members, None] * (1.0 - TOLERANCE)
        more = np.maximum(rows, 0.0)
        raised = 1.0 + np.cumsum(more, axis=1)
        # Not `raised - more`: requests without a token must be equals, to the bit.
        expected = np.concatenate((np.ones((len(rows), 1)), raised[:, :-1]), axis=1)
        return cls(
            members=members,
            present=rows >= 0.0,
            holds=expected / promised,
            reaches=(expected + _reach(rows)) / promised,
            gains=raised / expected,
        )

    def at(self, seconds: float) -> Ints:
        """Tokens of each member in a round that takes so long however many there are."""
        goes_on = self.present & (self.holds < seconds) & (self.gains > 1.0) & (self.reaches >= seconds)
        lengths: Ints = np.logical_and.accumulate(goes_on, axis=1).sum(axis=1)
        return lengths


def _in_turn(needs: _Needs, times: Floats, lengths: Ints) -> Ints:
    """Fills `lengths` token by token: each makes the round longer for all."""
    block = needs.holds.shape[1]
    order = np.argsort(needs.holds, axis=None, kind="stable")
    order = order[needs.present.ravel()[order]]
    columns = (order // block, *(one.ravel()[order] for one in (needs.holds, needs.reaches, needs.gains)))
    table, longer = times.tolist(), (times[1:] / times[:-1]).tolist()
    granted, stopped, count, last = [0] * len(needs.members), [False] * len(needs.members), 0, len(longer)
    for member, holds, reaches, gains in zip(*(one.tolist() for one in columns), strict=True):
        if count >= last:
            break
        if stopped[member]:
            continue
        now = table[count]
        if holds >= now:
            break  # the furthest behind is not behind
        if gains <= longer[count] or reaches < now:
            stopped[member] = True
            continue
        granted[member] += 1
        count += 1
    lengths[needs.members] = granted
    return lengths


def _reach(survival: Floats) -> Floats:
    """Of every token, what it and all after it bring if each is as likely, given the one before it, as
    the likeliest so far -> [requests, block]. What follows the token is not looked at but for its number.
    """
    before = np.concatenate((np.ones((len(survival), 1)), np.maximum(survival[:, :-1], 0.0)), axis=1)
    present = np.maximum(survival, 0.0)
    confidence = np.divide(present, before, out=np.zeros_like(present), where=before > 0.0)
    likeliest = np.minimum(np.maximum.accumulate(confidence, axis=1), 1.0)
    left = np.maximum((survival >= 0.0).sum(axis=1)[:, None] - np.arange(survival.shape[1]), 0)
    series = np.divide(
        1.0 - likeliest**left, 1.0 - likeliest, out=left.astype(np.float64), where=likeliest < 1.0 - TOLERANCE
    )
    reach: Floats = present * series
    return reach


def admit_within_floors(
    batch: PlanBatch,
    ranking: Ranking,
    lengths: Ints,
    candidates: Bools,
    seconds: Floats,
    most: int | None = None,
) -> Ints:
    """Goes on from `lengths`, best tokens of `candidates` [requests] first, and stops where a floor that
    holds would break. Also where one more token would not raise throughput (Algorithm 1), unless it is
    told how many draft tokens the round shall have at `most`.
    """
    used = int(lengths.sum())
    remaining = seconds[used:]
    room = len(remaining) - 1 if most is None else min(most - used, len(remaining) - 1)
    total = float(expected_tokens(batch, lengths) @ batch.weights)
    if room < 1 or (most is None and not _one_more_pays(batch, lengths, candidates, total, remaining)):
        return lengths
    ranking = ranking.beyond(np.where(candidates, lengths, batch.survival.shape[1]))
    count = min(room, len(ranking.values))
    if most is None:
        count = admit_while_rising(ranking, total, remaining)
    ranking = ranking.first(count)
    return lengths + ranking.lengths(_before_a_floor_breaks(batch, lengths, ranking, remaining))


def _one_more_pays(batch: PlanBatch, lengths: Ints, candidates: Bools, total: float, seconds: Floats) -> bool:
    """Whether the likeliest token that is next in its request raises throughput; Algorithm 1 ends if not."""
    block = batch.survival.shape[1]
    open_ = (candidates & (lengths < block)).nonzero()[0]
    following = batch.survival[open_, lengths[open_]] * batch.weights[open_]
    best = float(following.max(initial=0.0))
    return (total + best) / float(seconds[1]) > total / float(seconds[0])


def _before_a_floor_breaks(batch: PlanBatch, lengths: Ints, ranking: Ranking, seconds: Floats) -> int:
    """How many tokens of the ranking can be added to `lengths`; `seconds[n]` of the round with n of them.

    A floor allows a round so many seconds, and more from each token of its own on. Up to the first
    round that is too long all were allowed, so that is where the running maximum passes an allowance.
    """
    count = len(ranking.values)
    if not count:
        return 0
    by_length = np.cumsum(np.maximum(batch.survival, 0.0), axis=1)
    by_length = 1.0 + np.concatenate((np.zeros((batch.requests, 1)), by_length), axis=1)
    expected = by_length[np.arange(batch.requests), lengths]
    holding = (batch.floors > 0) & (expected >= batch.floors * seconds[0] * (1.0 - TOLERANCE))
    members = holding.nonzero()[0]
    if not members.size:
        return count
    allowed = by_length[members] / batch.floors[members, None] * (1.0 + TOLERANCE)  # [members, 1 + block]
    passed = np.maximum.accumulate(seconds[: count + 1]).searchsorted(allowed, side="right")
    until = _until(ranking, lengths, batch.survival.shape[1])[members]
    breaks = (passed < until) & (np.arange(until.shape[1]) >= lengths[members, None])
    return max(int(passed[breaks].min(initial=count + 1)) - 1, 0)


def _until(ranking: Ranking, lengths: Ints, block: int) -> Ints:
    """With how many tokens of the ranking a length ends, as the next is added -> [requests, 1 + block]."""
    count = len(ranking.values)
    until = np.full((len(lengths), block + 1), count + 1)
    until[ranking.requests, ranking.positions] = np.arange(1, count + 1)
    return until
