"""The scalar fast path for single-request rounds decides as the array code would."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.drafting_choice import better_looked_up, worth_drafting
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import plan_lengths
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.single_request import (
    better_looked_up_alone,
    length_alone,
    worth_drafting_alone,
)
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.records import DraftOrigin
from tests.unit.algorithms.described_plan import plan

SECONDS = st.floats(1e-4, 1.0)
CONTEXTS = st.integers(0, 4000)


@st.composite
def step_times(draw: st.DrawFn) -> StepTimeModel:
    """Points for some request counts, with or without varied context, and corrections from live steps."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True))
    points = [
        StepPoint(count, count * tokens, 128 * count, draw(SECONDS))
        for count in counts
        for tokens in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True))
    ]
    if draw(st.booleans()):
        points.append(StepPoint(counts[0], 13 * counts[0], 2048 * counts[0], draw(SECONDS)))
    corrections = draw(st.lists(st.floats(-0.5, 0.5), min_size=len(points), max_size=len(points)))
    scale = draw(st.floats(0.5, 2.0))
    given = tuple(corrections) if draw(st.booleans()) else ()
    return StepTimeModel(tuple(points), scale=scale, corrections=given)


@st.composite
def round_times(draw: st.DrawFn) -> RoundTimeModel:
    draft = DraftTimeModel((1,), (draw(st.floats(0.0, 0.5)),)) if draw(st.booleans()) else DraftTimeModel()
    return RoundTimeModel(draw(step_times()), draft, network_seconds=draw(st.floats(0.0, 0.1)))


@given(step_times(), st.integers(1, 8), st.floats(1.0, 40.0), CONTEXTS)
def test_one_step_takes_what_the_table_says(
    model: StepTimeModel, requests: int, tokens: float, context: int
) -> None:
    table = model.surface.seconds(requests, np.array([tokens]), context, model.corrections)
    assert model.seconds(requests, tokens, context) == pytest.approx(model.scale * table[0], rel=1e-9)


SURVIVAL = st.lists(st.one_of(st.floats(-0.2, 1.2), st.sampled_from([float("nan"), -0.0])), max_size=8)


@given(
    SURVIVAL,
    round_times(),
    CONTEXTS,
    st.sampled_from(DraftOrigin),
)
def test_the_length_is_that_of_the_search(
    survival: list[float], times: RoundTimeModel, context: int, origin: DraftOrigin
) -> None:
    one = PlanRequest(survival=tuple(survival), coupled=True, context_tokens=context, origin=origin)
    searched = plan([one], times)
    length = length_alone(one, times)
    assert plan_lengths([one], times) == (length,)
    lowest = np.minimum.accumulate(np.minimum(survival, 1.0)) if survival else np.zeros(0)
    assert np.all(lowest[:length] >= 0.0)

    drafted = int(origin is not DraftOrigin.LOOKUP and bool(np.any(lowest[:1] >= 0.0)))
    rate = (1.0 + lowest[:length].sum()) / times.seconds(1, 1 + length, context, drafted)
    # Of plans that are equal up to rounding, either may be taken.
    assert rate == pytest.approx(searched.expected_tokens / searched.expected_seconds, rel=1e-6)


@given(st.floats(0.0, 7.0), st.floats(0.0, 7.0), round_times(), CONTEXTS, st.sampled_from([0.0, 3.0]))
def test_the_choice_is_that_of_the_arrays(
    gain: float, verified: float, times: RoundTimeModel, context: int, price: float
) -> None:
    plain = 1.0 / times.seconds(1, 1, context)
    spent = price * times.draft.seconds(1)
    drafted = (1.0 + gain - spent) / times.seconds(1, 1.0 + verified, context, 1)
    if drafted != pytest.approx(plain, rel=1e-9):
        (expected,) = worth_drafting(np.array([gain]), np.array([verified]), times, context, price)
        assert worth_drafting_alone(gain, verified, times, context, price) == expected


@given(
    st.lists(st.floats(0.0, 1.0), max_size=8),
    st.floats(0.0, 7.0),
    st.floats(0.0, 9.0),
    round_times(),
    CONTEXTS,
    st.sampled_from([0.0, 3.0]),
)
def test_looked_up_tokens_are_chosen_as_by_arrays(
    lookup: list[float], gain: float, verified: float, times: RoundTimeModel, context: int, price: float
) -> None:
    """Except where rounding decides, that is, where a tiny change of the survivals changes the choice."""

    def by_arrays(nudge: float) -> bool:
        rows = [[value + nudge for value in lookup]]
        gains, lengths = np.array([gain]), np.array([verified])
        return bool(better_looked_up(rows, gains, lengths, times, context, price)[0])

    expected = {by_arrays(-1e-7), by_arrays(1e-7)}
    if len(expected) == 1:
        assert better_looked_up_alone(lookup, gain, verified, times, context, price) == expected.pop()


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), round_times(), st.floats(0.01, 0.3))
def test_a_draft_must_be_better_than_looked_up_tokens_by_the_least_gain(
    lookup: list[float], times: RoundTimeModel, least: float
) -> None:
    tokens = 1.0 + np.cumsum(np.minimum.accumulate(lookup))
    rate = max(float(expected) / times.seconds(1, 2 + k) for k, expected in enumerate(tokens))

    def looks_up(advantage: float) -> bool:
        seconds = times.seconds(1, 1.0) + times.overhead_seconds(1)
        gain = (1.0 + advantage) * rate * seconds - 1.0
        return better_looked_up_alone(lookup, gain, 0.0, times, least_gain=least)

    if rate > 1.0 / times.seconds(1, 1):
        assert looks_up(0.99 * least)
        assert not looks_up(1.01 * least)
