"""Whether a draft token is verified must not depend on what was drawn at its position or later.

Tested for every rule that may plan the current round of rejection sampling, with arbitrary step times, with
floors, and in batches where other requests look ahead.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.planner import capacity_of
from tests.unit.algorithms.described_plan import plan
from tests.unit.algorithms.planning_cases import (
    CONFIDENCE,
    CONFIDENCES,
    FLOORS,
    jagged_times,
    requests_of,
    times,
)


@st.composite
def two_futures(draw, mixed=False):
    """Two rounds that are equal up to token `position` of `request` and may differ after it.

    Both have the same block lengths, which do not depend on the drafted tokens.
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
@given(two_futures(), jagged_times(), st.none() | st.integers(0, 16))
def test_later_confidences_never_decide_on_a_token(case, round_time, capacity):
    one, other, request, position = case
    plans = [plan(each, round_time, capacity=capacity) for each in (one, other)]
    assert verifies(plans[0], request, position) == verifies(plans[1], request, position)


@settings(max_examples=400)
@given(two_futures(mixed=True), jagged_times(), st.none() | st.integers(0, 16))
def test_not_even_through_requests_that_look_ahead(case, round_time, capacity):
    one, other, request, position = case
    plans = [plan(each, round_time, capacity=capacity) for each in (one, other)]
    assert verifies(plans[0], request, position) == verifies(plans[1], request, position)


def test_a_planner_that_looks_ahead_is_caught():
    """The paper's appendix A: a planner that searches the round it plans decides about the first token by
    what follows it."""
    cliff = times(1.0, 2.0, 1 / 0.45)
    likely, unlikely = requests_of([[0.8, 0.9]]), requests_of([[0.8, 0.0]])
    plans = [plan(each, cliff, capacity=capacity_of(each, cliff)) for each in (likely, unlikely)]
    assert verifies(plans[0], 0, 1) != verifies(plans[1], 0, 1)
