"""Plans that may look ahead, compared to brute force: jagged times, floors, mixed batches."""

from dataclasses import replace
from itertools import accumulate, pairwise
from operator import mul

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.plan_batch import PlanBatch, rank
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.planner import capacity_of
from dspark_core.algorithms.speed_floor import expected_tokens
from tests.unit.algorithms.described_plan import plan
from tests.unit.algorithms.planning_cases import (
    CONFIDENCE,
    CONFIDENCES,
    FLOORS,
    every_plan,
    jagged_times,
    linear_times,
    requests_of,
    satisfaction,
    speeds_of,
    times,
)

ROUNDING = 1e-6


@st.composite
def floored(draw, coupled=None):
    """Requests, some of which have speed floors."""
    confidences = draw(CONFIDENCES)
    floors = [draw(FLOORS) for _ in confidences]
    free = [draw(st.booleans()) if coupled is None else coupled for _ in confidences]
    return requests_of(confidences, floors, free)


@given(CONFIDENCES, jagged_times())
def test_coupled_requests_get_the_best_plan_there_is(confidences, round_time):
    requests = requests_of(confidences, coupled=[True] * len(confidences))
    made = plan(requests, round_time)
    best = max(sum(speeds_of(requests, lengths, round_time)) for lengths in every_plan(requests))
    assert made.throughput == pytest.approx(best)
    assert made.throughput == pytest.approx(sum(speeds_of(requests, made.lengths, round_time)))


def within_reach(index, request, plans):
    """The request, without its floor if none of the plans holds it."""
    fastest = max(speeds[index] for _, speeds in plans)
    floor = request.floor_tokens_per_second
    return (
        request
        if floor is None or fastest >= floor * (1.0 - 1e-9)
        else PlanRequest(survival=request.survival, coupled=request.coupled)
    )


@settings(max_examples=300)
@given(floored(coupled=True), jagged_times())
def test_floors_come_first_then_throughput(requests, round_time):
    made = plan(requests, round_time)
    speeds = speeds_of(requests, made.lengths, round_time)
    others = [(lengths, speeds_of(requests, lengths, round_time)) for lengths in every_plan(requests)]
    promised = [within_reach(index, request, others) for index, request in enumerate(requests)]
    most = max(satisfaction(other, promised) for _, other in others)
    got = satisfaction(speeds, promised)
    if most >= 1.0 - ROUNDING:
        assert got >= 1.0 - ROUNDING
        held = [sum(other) for _, other in others if satisfaction(other, promised) >= 1.0 + ROUNDING]
        assert sum(speeds) >= max(held, default=0.0) * (1.0 - ROUNDING)
        if got >= 1.0 and promised == requests:
            assert made.unmet_floors == ()
    else:  # floors are relaxed by the smallest common factor that suffices
        assert got >= most * (1.0 - ROUNDING)
        assert made.unmet_floors != ()


def test_tokens_that_will_not_survive_are_tokens():
    ranking = rank(PlanBatch.of([PlanRequest(survival=(0.5, -0.0)), PlanRequest(survival=(0.0,))]))
    assert list(ranking.values) == [0.5, 0.0, 0.0]


def test_floors_that_cannot_hold_are_told():
    requests = requests_of([[0.9], [0.9]], floors=[None, 3.0], coupled=[True, True])
    made = plan(requests, times(1.0))
    assert made.lengths == (1, 1)  # as close to the floor as possible
    assert made.unmet_floors == (1,)


@given(
    st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.integers(1, 4)), min_size=1, max_size=4),
    st.data(),
    jagged_times(),
    st.none() | st.integers(0, 12),
    st.booleans(),
)
def test_floors_out_of_reach_change_nothing(rows, data, round_time, capacity, coupled):
    """If confidence is constant along a block; otherwise it takes tokens to find out."""
    confidences = [[confidence] * length for confidence, length in rows]
    hopeless = [data.draw(st.sampled_from([None, 100.0])) for _ in rows]
    free = [coupled] * len(rows)
    made = plan(requests_of(confidences, hopeless, free), round_time, capacity=capacity)
    plain = plan(requests_of(confidences, coupled=free), round_time, capacity=capacity)
    assert made.lengths == plain.lengths
    assert made.unmet_floors == tuple(index for index, floor in enumerate(hopeless) if floor)


@settings(max_examples=300)
@given(CONFIDENCES, jagged_times(), st.integers(0, 12), st.data())
def test_floors_in_vain_cost_at_most_the_tokens_spent_on_them(confidences, round_time, capacity, data):
    """They do not lengthen a round, and a token spent in vain displaces at most one expected token."""
    floors = [data.draw(st.none() | st.floats(30.0, 60.0)) for _ in confidences]
    requests = requests_of(confidences, floors)
    made = plan(requests, round_time, capacity=capacity)
    plain = plan(requests_of(confidences), round_time, capacity=capacity)
    assume(all(index in made.unmet_floors for index, floor in enumerate(floors) if floor))
    assert made.expected_seconds == pytest.approx(plain.expected_seconds)
    lost = sum(
        len(request.survival[before:after]) - sum(request.survival[before:after])
        for request, before, after in zip(requests, plain.lengths, made.lengths, strict=True)
    )
    assert made.expected_tokens >= plain.expected_tokens - lost - ROUNDING


def never_likelier_than_the_first(request):
    """The request with each conditional confidence capped at that of its first token."""
    pairs = pairwise((1.0, *request.survival))
    rates = [min(after / before if before else 0.0, request.survival[0]) for before, after in pairs]
    return replace(request, survival=tuple(accumulate(rates, mul)))


@settings(max_examples=300)
@given(floored(coupled=False), linear_times())
def test_the_tokens_of_early_stopping_hold_as_many_floors_when_spent_as_a_capacity(requests, round_time):
    """If no later token is likelier than the first: a floor is given up once tokens as likely as those so far
    would not hold it, and early stopping, which judges by shorter rounds, gives up later."""
    requests = [never_likelier_than_the_first(request) for request in requests]
    early = plan(requests, round_time)
    spent = plan(requests, round_time, capacity=early.draft_tokens)
    assert len(spent.unmet_floors) <= len(early.unmet_floors)


def test_a_capacity_gives_up_a_floor_that_only_a_rising_confidence_would_hold():
    """It must not look at the second token before the first is admitted, and the first alone is not promising
    enough for a round of the capacity's length."""
    requests = requests_of([[0.5], [0.375, 0.9]], floors=[None, 1.0])
    round_time = times(*(0.84375 + 0.28125 * more for more in range(4)))
    early = plan(requests, round_time)
    assert (early.lengths, early.unmet_floors) == ((0, 2), ())
    spent = plan(requests, round_time, capacity=early.draft_tokens)
    assert (spent.lengths, spent.unmet_floors) == ((1, 1), (1,))


def test_a_floor_takes_tokens_from_a_better_request():
    requests = requests_of([[0.9, 0.99], [0.5]], floors=[None, 1.15], coupled=[True, True])
    free = plan(requests_of([[0.9, 0.99], [0.5]], coupled=[True, True]), times(1.0, 1.0, 1.1, 1.25, 1.9))
    assert free.lengths == (2, 0)
    kept = plan(requests, times(1.0, 1.0, 1.1, 1.25, 1.9))
    assert kept.lengths == (1, 1)
    assert kept.unmet_floors == ()


@given(floored(coupled=False), jagged_times(), st.integers(0, 12))
def test_a_capacity_is_spent_unless_a_floor_that_holds_would_break(requests, round_time, capacity):
    made = plan(requests, round_time, capacity=capacity)
    tokens = sum(len(request.survival) for request in requests)
    assert made.draft_tokens <= capacity
    if made.draft_tokens < min(capacity, tokens):
        assert len(made.unmet_floors) < sum(bool(r.floor_tokens_per_second) for r in requests)


@given(floored(coupled=False), linear_times())
def test_early_stopping_breaks_no_floor_that_holds_without_it(requests, round_time):
    """Maximising throughput never breaks a floor: those that hold after floors are served hold in the end."""
    made = plan(requests, round_time)
    speeds = speeds_of(requests, made.lengths, round_time)
    plain = speeds_of(requests, [0] * len(requests), round_time)
    if all(
        speed >= (request.floor_tokens_per_second or 0.0)
        for speed, request in zip(plain, requests, strict=True)
    ):
        assert made.unmet_floors == ()
    for index, (speed, request) in enumerate(zip(speeds, requests, strict=True)):
        floor = request.floor_tokens_per_second or 0.0
        assert (index in made.unmet_floors) == (speed < floor * (1 - 1e-9))


@given(floored(), jagged_times())
def test_mixed_batches_are_never_worse_than_early_stopping_alone(requests, round_time):
    if any(request.floor_tokens_per_second for request in requests):
        requests = [PlanRequest(survival=r.survival, coupled=r.coupled) for r in requests]
    early = plan([PlanRequest(survival=r.survival) for r in requests], round_time)
    assert plan(requests, round_time).throughput >= early.throughput * (1 - ROUNDING)


@given(st.lists(CONFIDENCE, max_size=4), st.lists(CONFIDENCE, max_size=4), jagged_times())
def test_in_a_mixed_batch_the_free_request_is_best_for_what_the_other_verifies(kept, free, round_time):
    requests = requests_of([kept, free], coupled=[False, True])
    made = plan(requests, round_time)
    best = max(
        sum(speeds_of(requests, (made.lengths[0], length), round_time)) for length in range(len(free) + 1)
    )
    assert made.throughput == pytest.approx(best)


@given(CONFIDENCES, jagged_times())
def test_capacities_do_not_care_who_may_look_ahead(confidences, round_time):
    free = requests_of(confidences, coupled=[True] * len(confidences))
    assert capacity_of(requests_of(confidences), round_time) == capacity_of(free, round_time)
    assert capacity_of(free, round_time) == plan(free, round_time).draft_tokens


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.6, 0.9, 1.1]))
def test_groups_of_needs_that_are_not_looked_at_hold_no_better_plan(count, seed, level):
    """Under floors, compared to a search that tries every number of draft tokens separately."""
    source = np.random.default_rng(seed)
    rows = source.choice([0.3, 0.5, 0.9, 1.0], (count, 4)) if seed % 2 else source.random((count, 4))
    seconds = np.sort(0.01 + 0.02 * source.random(4 * count + 1))
    floors = level / seconds[0] * source.choice([0.5, 1.0], count)
    confidences = [row.tolist() for row in rows]
    batch = PlanBatch.of(requests_of(confidences, floors.tolist(), [True] * count))
    held = batch.by_length / (batch.floors * (1.0 - 1e-9))  # the longest round that each length holds
    if (held[-1] < seconds[0]).any():
        return  # some floor is out of reach
    best = 0.0
    for tokens, taken in enumerate(seconds.tolist()):
        needed = (held < taken).sum(axis=0)
        if needed.sum() > tokens or (needed > 4).any():
            continue
        others = rank(batch).beyond(needed)
        lengths = needed + others.lengths(tokens - int(needed.sum()))
        best = max(best, float(expected_tokens(batch, lengths).sum()) / taken)
    lengths = search(batch, seconds)
    reached = float(expected_tokens(batch, lengths).sum()) / float(seconds[int(lengths.sum())])
    assert best == 0.0 or reached >= best * (1.0 - 1e-9)
