"""Algorithm 1, best-first order and capacities agree with their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.delayed_scheduler import spend
from dspark_core.algorithms.plan_batch import PlanBatch, rank
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import capacity_of, plan_lengths
from dspark_core.algorithms.prefix_scheduler import AT_FIRST, admit_while_rising, survival_from_confidence
from dspark_core.errors import InvalidRequestError
from tests.unit.algorithms.described_plan import plan
from tests.unit.algorithms.planning_cases import (
    CONFIDENCES,
    every_plan,
    jagged_times,
    linear_times,
    requests_of,
    speeds_of,
    times,
)

CLIFF = times(1.0, 2.0, 1 / 0.45)  # paper, appendix A


@pytest.mark.parametrize("later_confidence", [0.0, 0.9])
def test_admission_ignores_tokens_not_yet_drawn(later_confidence):
    made = plan(requests_of([[0.8, later_confidence]]), CLIFF)
    assert made.lengths == (0,)
    assert made.throughput == pytest.approx(1.0)


def test_no_requests_need_no_plan():
    assert plan_lengths([], CLIFF) == ()
    assert capacity_of([], CLIFF) == 0


def test_a_free_batch_admits_everything_that_can_survive():
    made = plan(requests_of([[0.9, 0.1], [], [0.5, 0.0]]), times(0.1, 0.1))
    assert made.lengths == (2, 0, 1)  # a token that cannot survive does not raise throughput
    assert made.throughput == pytest.approx((3 + 0.9 + 0.09 + 0.5) / 0.1)
    assert made.expected_tokens == pytest.approx(4.49)


@given(CONFIDENCES, linear_times())
def test_the_plan_is_optimal_where_throughput_has_one_peak(confidences, round_time):
    """Sorted survival makes expected tokens concave, so with a linear step time there is exactly one peak."""
    requests = requests_of(confidences)
    made = plan(requests, round_time)
    best = max(sum(speeds_of(requests, lengths, round_time)) for lengths in every_plan(requests))
    assert made.throughput == pytest.approx(best)
    assert made.throughput == pytest.approx(sum(speeds_of(requests, made.lengths, round_time)))


@given(CONFIDENCES, jagged_times())
def test_algorithm_1_is_the_sequential_one(confidences, round_time):
    """The array implementation equals admitting one token at a time until one does not raise throughput."""
    requests = requests_of(confidences)
    tokens = sorted(
        ((-float(np.float32(a)), j, r) for r, one in enumerate(requests) for j, a in enumerate(one.survival)),
    )
    lengths = [0] * len(requests)
    best = sum(speeds_of(requests, lengths, round_time))
    for _, position, request in tokens:
        tried = [*lengths[:request], position + 1, *lengths[request + 1 :]]
        throughput = sum(speeds_of(requests, tried, round_time))
        if abs(throughput - best) < 1e-9 * best:
            return  # a tie that rounding decides
        if throughput < best:
            break
        lengths, best = tried, throughput
    assert list(plan(requests, round_time).lengths) == lengths


@given(CONFIDENCES, st.integers(0, 20))
def test_a_capacity_is_spent_on_the_tokens_most_likely_to_survive(confidences, capacity):
    requests = requests_of(confidences)
    lengths = plan(requests, times(1.0), capacity=capacity).lengths
    values = sorted((value for request in requests for value in request.survival), reverse=True)
    assert sum(lengths) == min(capacity, len(values))
    admitted = sorted(
        (v for request, n in zip(requests, lengths, strict=True) for v in request.survival[:n]), reverse=True
    )
    assert admitted == pytest.approx(values[:capacity])


def test_ties_go_to_the_earlier_position_then_the_earlier_request():
    requests = [PlanRequest(survival=(0.5, 0.5)), PlanRequest(survival=(0.5, 0.5))]
    plans = [plan(requests, times(1.0), capacity=capacity).lengths for capacity in range(5)]
    assert plans == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]


@given(st.integers(2, 6), st.integers(0, 30), st.integers(1, 40))
def test_equal_requests_differ_by_at_most_one_token_over_time(requests, capacity, rounds):
    granted = [0] * requests
    for _ in range(rounds):
        asked = [PlanRequest(survival=(0.7, 0.49, 0.3), granted=float(total)) for total in granted]
        for index, length in enumerate(plan(asked, times(1.0), capacity=capacity).lengths):
            granted[index] += length
        assert max(granted) - min(granted) <= 1


@given(CONFIDENCES, jagged_times())
def test_a_capacity_from_a_round_that_is_over_is_its_global_optimum(confidences, round_time):
    requests = requests_of(confidences)
    made = plan(requests, round_time, capacity=capacity_of(requests, round_time))
    best = max(sum(speeds_of(requests, lengths, round_time)) for lengths in every_plan(requests))
    assert sum(speeds_of(requests, made.lengths, round_time)) == pytest.approx(best)


def test_a_capacity_crosses_a_cliff():
    assert capacity_of(requests_of([[0.8, 0.9]]), CLIFF) == 2
    assert capacity_of(requests_of([[0.8, 0.0]]), CLIFF) == 0


def test_a_capacity_has_room_for_what_floors_need() -> None:
    """The token loses throughput, but holds the floor of the one request that it speeds up."""
    round_time, confidences = times(1.0, 1.0, 1.3), [[0.5], []]
    assert capacity_of(requests_of(confidences), round_time) == 0
    assert capacity_of(requests_of(confidences, floors=[1.1, None]), round_time) == 1


def test_the_smaller_of_equal_capacities_is_taken():
    assert capacity_of(requests_of([[0.0, 0.0]]), times(1.0)) == 0


def test_draft_and_network_time_make_longer_rounds_worth_their_wait():
    steps = times(1.0, 1.9, 2.8).verify
    requests = requests_of([[0.7, 0.8]])
    alone = plan(requests, times(1.0, 1.9, 2.8))
    assert alone.lengths == (0,)
    from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel

    waiting = RoundTimeModel(steps, DraftTimeModel((1,), (2.0,)), 1.0)
    assert plan(requests, waiting).lengths == (2,)


@pytest.mark.parametrize("row", [(float("nan"), 0.5), (-0.1, 0.5)])
def test_a_survival_that_is_no_probability_is_not_admitted(row):
    requests = [PlanRequest(survival=row), PlanRequest(survival=(0.5,))]
    assert plan(requests, times(1.0)).lengths == (0, 1)
    assert plan(requests, times(1.0), capacity=9).lengths == (0, 1)


def test_rising_survival_is_not_believed():
    lengths = plan([PlanRequest(survival=(0.2, 0.9)), PlanRequest(survival=(0.5,))], times(1.0), capacity=1)
    assert lengths.lengths == (0, 1)


def test_negative_capacity_is_refused():
    with pytest.raises(InvalidRequestError, match="capacity must be >= 0, got -1"):
        spend(PlanBatch.of([PlanRequest(survival=(0.5,))]), -1, np.ones(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"floor_tokens_per_second": 0.0}, "floor_tokens_per_second must be > 0, got 0.0"),
        ({"floor_tokens_per_second": float("nan")}, "got nan"),
        ({"context_tokens": -1}, "context_tokens must be >= 0"),
    ],
)
def test_impossible_requests_are_refused(fields, message):
    with pytest.raises(InvalidRequestError, match=message):
        PlanRequest(**fields)


@given(CONFIDENCES, st.data())
def test_tokens_are_ranked_by_survival_then_position_then_who_was_granted_less(confidences, data):
    granted = [data.draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in confidences]
    batch = PlanBatch.of(
        [
            PlanRequest(survival=r.survival, granted=g)
            for r, g in zip(requests_of(confidences), granted, strict=True)
        ]
    )
    ranking = rank(batch)
    expected = sorted(
        (-np.float32(value), position, granted[request], request)
        for request, row in enumerate(batch.survival.tolist())
        for position, value in enumerate(row)
        if value >= 0.0
    )
    assert ranking.requests.tolist() == [request for *_, request in expected]
    assert ranking.positions.tolist() == [position for _, position, *_ in expected]


@given(CONFIDENCES, st.data())
def test_a_ranking_without_used_tokens_keeps_the_order_of_the_others(confidences, data):
    batch = PlanBatch.of(requests_of(confidences))
    used = np.array([data.draw(st.integers(0, len(row))) for row in confidences])
    whole, left = rank(batch), rank(batch).beyond(used)
    expected, seen = [], dict.fromkeys(range(len(used)), 0)
    for request, value in zip(whole.requests.tolist(), whole.values.tolist(), strict=True):
        seen[request] += 1
        if seen[request] > used[request]:
            expected.append((request, value))
    assert list(zip(left.requests.tolist(), left.values.tolist(), strict=True)) == expected


def test_seconds_shorter_than_the_tokens_bound_algorithm_1():
    ranking = rank(PlanBatch.of([PlanRequest(survival=(0.9, 0.9, 0.9))]))
    assert admit_while_rising(ranking, 1.0, np.ones(3)) == 2


@pytest.mark.parametrize("stop", [0, 1, AT_FIRST - 1, AT_FIRST, AT_FIRST + 1, 2 * AT_FIRST, None])
def test_it_does_not_matter_how_many_tokens_are_looked_at_first(stop):
    tokens = 2 * AT_FIRST + 5
    seconds = np.ones(tokens + 1)
    if stop is not None:
        seconds[stop + 1 :] = 2.0
    ranking = rank(PlanBatch.of([PlanRequest(survival=(0.5,))] * tokens))
    assert admit_while_rising(ranking, float(tokens), seconds) == (tokens if stop is None else stop)


def test_survival_is_the_running_product():
    assert survival_from_confidence([0.5, 0.5, 1.0]) == (0.5, 0.25, 0.25)
    assert survival_from_confidence([]) == ()


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(bad):
    with pytest.raises(InvalidRequestError, match="position 2 must be in"):
        survival_from_confidence([0.5, bad])
