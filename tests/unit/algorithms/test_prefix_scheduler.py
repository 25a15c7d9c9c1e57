from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.prefix_scheduler import (
    PrefixScheduler,
    capacity_plan,
    survival_from_confidence,
    unconstrained_capacity,
)
from dspark_core.errors import InvalidRequestError

CLIFF = {1: 1.0, 2: 0.5, 3: 0.45}.__getitem__  # paper, appendix A

CONFIDENCES = st.lists(
    # Few distinct values, so that ties between requests and positions are common.
    st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]) | st.floats(0, 1), max_size=4),
    min_size=1,
    max_size=4,
)


@st.composite
def step_rates(draw):
    """Any positive table, however jagged."""
    table = draw(st.lists(st.floats(0.01, 1.0), min_size=20, max_size=20))
    return lambda batch_tokens: table[batch_tokens - 1]


@st.composite
def linear_step_rates(draw):
    fixed, per_token = draw(st.floats(0.1, 2.0)), draw(st.floats(0.0, 1.0))
    return lambda batch_tokens: 1.0 / (fixed + per_token * batch_tokens)


def survivals(confidences):
    return [survival_from_confidence(row) for row in confidences]


def throughput(survival, lengths, steps_per_second):
    expected = sum(1.0 + sum(row[:length]) for row, length in zip(survival, lengths, strict=True))
    return expected * steps_per_second(len(survival) + sum(lengths))


@pytest.mark.parametrize("later_confidence", [0.0, 0.9])
def test_admission_ignores_tokens_not_yet_drawn(later_confidence):
    plan = PrefixScheduler(CLIFF).plan([survival_from_confidence([0.8, later_confidence])])
    assert plan.lengths == (0,)
    assert plan.throughput == 1.0


def test_no_requests_need_no_plan():
    assert PrefixScheduler(CLIFF).plan([]).lengths == ()
    assert PrefixScheduler(CLIFF).plan([]).throughput == 0.0
    assert capacity_plan([], 5) == ()
    assert unconstrained_capacity([], CLIFF) == 0


def test_a_free_batch_admits_everything_that_can_survive():
    plan = PrefixScheduler(lambda _: 10.0).plan([[0.9, 0.1], [], [0.5, 0.0]])
    assert plan.lengths == (2, 0, 1)  # a token that cannot survive does not raise throughput
    assert plan.throughput == pytest.approx(45.0)


@given(CONFIDENCES, linear_step_rates())
def test_the_plan_is_optimal_where_throughput_has_one_peak(confidences, steps_per_second):
    """Sorted survival makes expected tokens concave, so over a linear step time one peak is sure."""
    survival = survivals(confidences)
    plan = PrefixScheduler(steps_per_second).plan(survival)
    best = max(
        throughput(survival, lengths, steps_per_second)
        for lengths in product(*(range(len(row) + 1) for row in survival))
    )
    assert plan.throughput == pytest.approx(best)
    assert plan.throughput == pytest.approx(throughput(survival, plan.lengths, steps_per_second))


def with_other_future(confidences, request, position, future):
    """The same round up to token `position` of `request`; what comes after it is different."""
    changed = [list(row) for row in confidences]
    changed[request][position:] = future
    return changed


@given(CONFIDENCES, st.data())
def test_later_confidences_never_decide_whether_a_token_is_verified(confidences, data):
    """The causal barrier, for every rule that may plan the current round, on any step rate."""
    rows = [r for r, row in enumerate(confidences) if row]
    if not rows:
        return
    request = data.draw(st.sampled_from(rows))
    position = data.draw(st.integers(1, len(confidences[request])))
    future = data.draw(st.lists(st.floats(0, 1), max_size=4 - position))
    scheduler = PrefixScheduler(data.draw(step_rates()))
    capacity = data.draw(st.integers(0, 16))
    one = survivals(confidences)
    other = survivals(with_other_future(confidences, request, position, future))
    for plan in (lambda s: scheduler.plan(s).lengths, lambda s: capacity_plan(s, capacity)):
        assert (plan(one)[request] >= position) == (plan(other)[request] >= position)


@given(CONFIDENCES, st.integers(0, 20))
def test_a_capacity_is_spent_on_the_tokens_most_likely_to_survive(confidences, capacity):
    survival = survivals(confidences)
    lengths = capacity_plan(survival, capacity)
    values = sorted((value for row in survival for value in row), reverse=True)
    assert sum(lengths) == min(capacity, len(values))
    admitted = sorted((v for row, n in zip(survival, lengths, strict=True) for v in row[:n]), reverse=True)
    assert admitted == values[:capacity]


def test_ties_go_to_the_earlier_position_then_the_earlier_request():
    equal = [[0.5, 0.5], [0.5, 0.5]]
    plans = [capacity_plan(equal, capacity) for capacity in range(5)]
    assert plans == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]


@given(CONFIDENCES, step_rates(), st.data())
def test_caps_bound_each_request(confidences, steps_per_second, data):
    survival = survivals(confidences)
    caps = [data.draw(st.integers(0, 5)) for _ in survival]
    truncated = [row[:cap] for row, cap in zip(survival, caps, strict=True)]
    scheduler = PrefixScheduler(steps_per_second)
    assert scheduler.plan(survival, caps) == scheduler.plan(truncated)
    assert capacity_plan(survival, 6, caps) == capacity_plan(truncated, 6)


@given(CONFIDENCES, step_rates())
def test_unconstrained_capacity_is_the_global_optimum(confidences, steps_per_second):
    survival = survivals(confidences)
    total = sum(len(row) for row in survival)
    rates = [
        throughput(survival, capacity_plan(survival, count), steps_per_second) for count in range(total + 1)
    ]
    assert rates[unconstrained_capacity(survival, steps_per_second)] == pytest.approx(max(rates))


def test_unconstrained_capacity_crosses_a_cliff():
    survival = [survival_from_confidence([0.8, 0.9])]
    assert unconstrained_capacity(survival, CLIFF) == 2
    assert unconstrained_capacity([[0.8, 0.0]], CLIFF) == 0


def test_unconstrained_capacity_prefers_the_smaller_of_equal_counts():
    assert unconstrained_capacity([[0.0, 0.0]], lambda _: 1.0) == 0


def test_a_survival_that_is_not_a_number_is_not_admitted():
    assert PrefixScheduler(lambda _: 1.0).plan([[float("nan"), 0.5]]).lengths == (0,)


def test_negative_capacity_is_refused():
    with pytest.raises(InvalidRequestError, match="capacity must be >= 0, got -1"):
        capacity_plan([[0.5]], -1)


def test_survival_is_the_running_product():
    assert survival_from_confidence([0.5, 0.5, 1.0]) == (0.5, 0.25, 0.25)
    assert survival_from_confidence([]) == ()


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(bad):
    with pytest.raises(InvalidRequestError, match="position 2 must be in"):
        survival_from_confidence([0.5, bad])
