"""Whether a draft token is verified must not depend on what was drawn at it or after it.

For every rule that may plan the current round of rejection sampling: any step times, with floors,
and in batches where other requests look ahead.
"""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.planner import capacity_of, plan
from tests.unit.algorithms.planning_cases import CONFIDENCE, CONFIDENCES, FLOORS, jagged_times, requests_of


@st.composite
def two_futures(draw, mixed=False):
    """A round twice, the same up to token `position` of `request`; what comes after it differs.

    Requests' blocks are whole, as their number of tokens is no secret of the drafter's choice.
    """
    confidences = draw(CONFIDENCES.filter(lambda rows: any(rows)))
    request = draw(st.sampled_from([r for r, row in enumerate(confidences) if row]))
    position = draw(st.integers(1, len(confidences[request])))
    rest = len(confidences[request]) - position
    future = draw(st.lists(CONFIDENCE, min_size=rest, max_size=rest))
    other = [list(row) for row in confidences]
    other[request][position:] = future
    floors = [draw(FLOORS) for _ in confidences]
    coupled = [mixed and index != request and draw(st.booleans()) for index in range(len(confidences))]
    return (
        requests_of(confidences, floors, coupled),
        requests_of(other, floors, coupled),
        request,
        position,
    )


def verifies(made, request, position):
    return made.lengths[request] >= position


@settings(max_examples=400)
@given(two_futures(), jagged_times(), st.none() | st.integers(0, 16), st.none() | st.integers(0, 8))
def test_later_confidences_never_decide_on_a_token(case, round_time, capacity, most):
    one, other, request, position = case
    plans = [plan(each, round_time, capacity=capacity, max_draft_tokens=most) for each in (one, other)]
    assert verifies(plans[0], request, position) == verifies(plans[1], request, position)


@settings(max_examples=400)
@given(two_futures(mixed=True), jagged_times(), st.none() | st.integers(0, 16))
def test_not_even_through_requests_that_look_ahead(case, round_time, capacity):
    one, other, request, position = case
    plans = [plan(each, round_time, capacity=capacity) for each in (one, other)]
    assert verifies(plans[0], request, position) == verifies(plans[1], request, position)


def test_a_planner_that_looks_ahead_is_caught():
    """The same law refuses a search of this round: it can fail."""

    @settings(max_examples=1000, database=None, derandomize=True, phases=[Phase.generate])
    @given(two_futures(), jagged_times())
    def holds(case, round_time):
        one, other, request, position = case
        plans = [plan(each, round_time, capacity=capacity_of(each, round_time)) for each in (one, other)]
        assert verifies(plans[0], request, position) == verifies(plans[1], request, position)

    with pytest.raises(AssertionError):
        holds()
