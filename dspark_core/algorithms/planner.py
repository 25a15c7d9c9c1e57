"""Plans one round: speed floors first, then expected tokens per second of round time.

A pure function of the requests, the times and a capacity. Requests that may look ahead (coupled,
greedy) get optimal lengths whatever the shape of the step times. The others keep the causal barrier:
Algorithm 1 with early stopping, or a capacity from past rounds. A mixed batch plans the two kinds in
turns. No information about tokens not yet admitted leaks to the second kind, because what is planned for
the first depends only on which of the second's tokens were admitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_core.algorithms import delayed_scheduler
from dspark_core.algorithms.mixed_turns import take_turns
from dspark_core.algorithms.plan_batch import Ints, PlanBatch, Ranking, rank
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.prefix_scheduler import admit_while_rising, one_more_pays
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.single_request import decides_alone, length_alone
from dspark_core.algorithms.speed_floor import (
    admit_floors,
    admit_within_floors,
)
from dspark_core.algorithms.step_surface import Floats


def plan_lengths(
    requests: Sequence[PlanRequest], round_time: RoundTimeModel, *, capacity: int | None = None
) -> tuple[int, ...]:
    """Verify lengths for this round, in the order of the requests.

    `capacity`: total draft tokens to verify, taken from past rounds (`capacity_of`); None:
    Algorithm 1. It must not depend on this round's draft tokens.
    """
    if len(requests) == 1 and decides_alone(requests[0]):
        return (length_alone(requests[0], round_time),)
    return plan_batch(PlanBatch.of(requests), round_time, capacity=capacity)


def plan_batch(
    batch: PlanBatch, round_time: RoundTimeModel, *, capacity: int | None = None
) -> tuple[int, ...]:
    """`plan_lengths` of a batch that is already in array form."""
    if batch.requests == 0:
        return ()
    return tuple(_lengths(batch, _seconds(batch, round_time), capacity).tolist())


def follows_capacity(requests: Sequence[PlanRequest]) -> bool:
    """Whether `plan_lengths` heeds a capacity: not where every request with drafts may look ahead, since its
    optimum for this round is known."""
    return any(len(request.survival) and not request.coupled for request in requests)


def capacity_of(requests: Sequence[PlanRequest], round_time: RoundTimeModel) -> int:
    """The best capacity for a past round, to be used by `plan_lengths` at least two rounds later."""
    batch = PlanBatch.of(requests)
    if batch.requests == 0:
        return 0
    return delayed_scheduler.capacity(batch, _seconds(batch, round_time))


def _seconds(batch: PlanBatch, round_time: RoundTimeModel) -> Floats:
    """Times of rounds with 0, 1, ... draft tokens, including drafting for requests the drafter served."""
    tokens = int(np.count_nonzero(batch.survival >= 0.0))
    drafted = int(np.count_nonzero(batch.survival[:, 0] >= 0.0)) - batch.looked_up if tokens else 0
    return round_time.table(batch.requests, tokens, batch.context_tokens, drafted)


def _lengths(batch: PlanBatch, seconds: Floats, capacity: int | None) -> Ints:
    if batch.coupled.all():
        return search(batch, seconds)
    return _early(batch, seconds) if capacity is None else _delayed(batch, seconds, capacity)


def _early(batch: PlanBatch, seconds: Floats) -> Ints:
    mixed = bool(np.count_nonzero(batch.coupled))
    if not batch.has_floors:
        return take_turns(batch, seconds) if mixed else _algorithm_1(batch, seconds)
    everyone, start = np.ones(batch.requests, dtype=np.bool_), admit_floors(batch, seconds)
    if not mixed:
        return admit_within_floors(batch, start, everyone, seconds)
    ranking = rank(batch)
    admitted = admit_within_floors(batch, start, everyone, seconds, ranking=ranking)
    # A stair climbed for coupled tokens may have room for more of the others, and vice versa.
    free = _free(batch, ranking)
    lengths = search(batch, seconds, admitted, batch.coupled, free)
    more = admit_within_floors(batch, lengths, ~batch.coupled, seconds, ranking=ranking)
    return lengths if more is lengths else search(batch, seconds, more, batch.coupled, free)


def _algorithm_1(batch: PlanBatch, seconds: Floats) -> Ints:
    nothing, expected = np.zeros(batch.requests, dtype=np.int64), float(batch.requests)
    # Checking only the first tokens takes a fifth of the time of ranking all.
    if batch.survival.shape[1] == 0 or not one_more_pays(batch.survival[:, 0], expected, seconds):
        return nothing
    ranking = rank(batch)
    return ranking.lengths(admit_while_rising(ranking, expected, seconds))


def _delayed(batch: PlanBatch, seconds: Floats, capacity: int) -> Ints:
    if not np.count_nonzero(batch.coupled):
        return delayed_scheduler.spend(batch, capacity, seconds)
    ranking = rank(batch)
    lengths = delayed_scheduler.spend(batch, capacity, seconds, ranking)
    return search(batch, seconds, lengths, batch.coupled, _free(batch, ranking))


def _free(batch: PlanBatch, ranking: Ranking) -> Ranking:
    """The ranking restricted to coupled requests."""
    return ranking.beyond(np.where(batch.coupled, 0, ranking.block))
