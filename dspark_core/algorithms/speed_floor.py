"""Speed floors: a request's expected tokens per round over the round's seconds is at least its floor.

Floors come first, throughput after. Everything here decides token by token and looks at no token
before it decides on it, so it may plan rejection sampling. `plan_search` knows floors too, for
requests that may look ahead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, rank
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
    stopped, count, last = set[int](), 0, len(seconds) - 1
    table = seconds.tolist()
    for request, floor, expected, raised, reach in _most_urgent(batch):
        if count >= last:
            break
        if request in stopped:
            continue
        now, then = max(table[count], judged_at), max(table[count + 1], judged_at)
        if expected >= floor * now * (1.0 - TOLERANCE):
            break  # the furthest behind is not behind
        if raised * now <= expected * then or reach < floor * now * (1.0 - TOLERANCE):
            stopped.add(request)
            continue
        lengths[request] += 1
        count += 1
    return lengths


def _most_urgent(batch: PlanBatch) -> Iterator[tuple[int, float, float, float, float]]:
    """Tokens of requests with floors, in the order of how far behind a request is before the token:
    (request, floor, expected tokens without it, with it, at most with all that follow)."""
    members = batch.floors.nonzero()[0]
    if not members.size or batch.survival.shape[1] == 0:
        return iter(())
    rows = batch.survival[members]
    gains = np.maximum(rows, 0.0)
    raised = 1.0 + np.cumsum(gains, axis=1)
    expected, floors = raised - gains, np.broadcast_to(batch.floors[members, None], rows.shape)
    position = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    granted = np.broadcast_to(batch.granted[members, None], rows.shape)
    names = np.broadcast_to(members[:, None], rows.shape)
    columns = (names, floors, expected, raised, expected + _reach(rows))
    order = np.lexsort((position.ravel(), names.ravel(), granted.ravel(), (-floors / expected).ravel()))
    order = order[rows.ravel()[order] >= 0.0]
    return zip(*(column.ravel()[order].tolist() for column in columns), strict=True)


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
    batch: PlanBatch, lengths: Ints, candidates: Bools, seconds: Floats, most: int | None = None
) -> Ints:
    """Goes on from `lengths`, best tokens of `candidates` [requests] first, and stops where a floor that
    holds would break. Also where one more token would not raise throughput (Algorithm 1), unless it is
    told how many draft tokens the round shall have at `most`.
    """
    ranking = rank(batch, None if candidates.all() else candidates).without(np.where(candidates, lengths, 0))
    used = int(lengths.sum())
    remaining = seconds[used:]
    if most is None:
        total = float(expected_tokens(batch, lengths) @ batch.weights)
        count = admit_while_rising(ranking, total, remaining)
    else:
        count = max(min(most - used, len(ranking.values), len(remaining) - 1), 0)
    ranking = Ranking(ranking.requests[:count], ranking.values[:count])
    return lengths + ranking.lengths(
        _before_a_floor_breaks(batch, lengths, ranking, remaining), batch.requests
    )


def _before_a_floor_breaks(batch: PlanBatch, lengths: Ints, ranking: Ranking, seconds: Floats) -> int:
    """How many tokens of the ranking can be added to `lengths`; `seconds[n]` of the round with n of them.

    A floor allows a round so many seconds, and more from each token of its own on. Up to the first
    round that is too long all were allowed, so that is where the running maximum passes an allowance.
    """
    count = len(ranking.requests)
    by_length = np.cumsum(np.maximum(batch.survival, 0.0), axis=1)
    by_length = 1.0 + np.concatenate((np.zeros((batch.requests, 1)), by_length), axis=1)
    expected = by_length[np.arange(batch.requests), lengths]
    holding = (batch.floors > 0) & (expected >= batch.floors * seconds[0] * (1.0 - TOLERANCE))
    members = holding.nonzero()[0]
    if not members.size or not count:
        return count
    allowed = by_length[members] / batch.floors[members, None] * (1.0 + TOLERANCE)  # [members, 1 + block]
    passed = np.maximum.accumulate(seconds[: count + 1]).searchsorted(allowed, side="right")
    until = _until(ranking, lengths, batch.survival.shape[1])[members]
    breaks = (passed < until) & (np.arange(until.shape[1]) >= lengths[members, None])
    return max(int(passed[breaks].min(initial=count + 1)) - 1, 0)


def _until(ranking: Ranking, lengths: Ints, block: int) -> Ints:
    """With how many tokens of the ranking a length ends, as the next is added -> [requests, 1 + block]."""
    requests, count = len(lengths), len(ranking.requests)
    until = np.full((requests, block + 1), count + 1)
    order = np.argsort(ranking.requests, kind="stable")
    owners = ranking.requests[order]
    each = np.bincount(owners, minlength=requests)
    nth = np.arange(count) - np.repeat(np.cumsum(each) - each, each)
    until[owners, lengths[owners] + nth] = order + 1
    return until
