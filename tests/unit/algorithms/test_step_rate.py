import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.errors import ConfigError

CURVE = StepRateCurve((1, 5, 9), (0.010, 0.010, 0.018))


@st.composite
def curves(draw):
    tokens = sorted(draw(st.sets(st.integers(1, 500), min_size=1, max_size=8)))
    seconds = draw(st.lists(st.floats(1e-4, 1.0), min_size=len(tokens), max_size=len(tokens)))
    return StepRateCurve(tuple(tokens), tuple(seconds))


@pytest.mark.parametrize(
    ("batch_tokens", "seconds"),
    [(1, 0.010), (3, 0.010), (5, 0.010), (6, 0.012), (9, 0.018), (10, 0.020), (109, 0.218)],
)
def test_steps_are_interpolated_and_continued_at_the_last_slope(batch_tokens, seconds):
    assert CURVE.seconds(batch_tokens) == pytest.approx(seconds)
    assert CURVE.steps_per_second(batch_tokens) == pytest.approx(1 / seconds)


def test_the_ends_stay_level_where_nothing_else_is_known():
    falling = StepRateCurve((4, 8), (0.02, 0.01))
    assert falling.seconds(1) == 0.02
    assert falling.seconds(10_000) == 0.01
    assert StepRateCurve((4,), (0.02,)).seconds(100) == 0.02


@given(curves())
def test_a_curve_passes_through_its_points(curve):
    for tokens, seconds in zip(curve.batch_tokens, curve.step_seconds, strict=True):
        assert curve.seconds(tokens) == pytest.approx(seconds)


@given(curves())
def test_a_repaired_curve_never_falls_and_keeps_the_mean(curve):
    repaired = curve.monotone().step_seconds
    assert list(repaired) == sorted(repaired)
    assert sum(repaired) == pytest.approx(sum(curve.step_seconds))
    if list(curve.step_seconds) == sorted(curve.step_seconds):
        assert repaired == pytest.approx(curve.step_seconds)


def test_a_dip_is_shared_by_the_points_around_it():
    assert StepRateCurve((1, 2, 3, 4), (1.0, 3.0, 2.0, 4.0)).monotone().step_seconds == (1.0, 2.5, 2.5, 4.0)


def test_overhead_is_added_to_every_step():
    assert CURVE.with_overhead(0.005).seconds(6) == pytest.approx(0.017)
    assert CURVE.with_overhead(0.005).seconds(10) == pytest.approx(0.025)


@pytest.mark.parametrize("batch_tokens", [1, 3, 5, 7, 9, 40])
def test_repeated_observations_are_learned(batch_tokens):
    curve, truth = CURVE, 3 * CURVE.seconds(batch_tokens)
    for _ in range(2000):
        curve = curve.observed(batch_tokens, truth)
    assert curve.seconds(batch_tokens) == pytest.approx(truth, rel=0.01)


def test_an_observation_moves_its_neighbours_only_and_leaves_the_old_curve():
    curve = CURVE.observed(6, 2 * CURVE.seconds(6), rate=0.1)
    before = CURVE.step_seconds
    assert before == (0.010, 0.010, 0.018)
    assert curve.step_seconds[0] == before[0]
    assert curve.step_seconds[1] / before[1] == pytest.approx(1.075)  # 6 is nearer to 5
    assert curve.step_seconds[2] / before[2] == pytest.approx(1.025)


def test_one_outlier_moves_a_point_by_a_bounded_share():
    stalled = CURVE.observed(5, 1e6, rate=0.05, clip=2.0)
    assert stalled.step_seconds[1] == pytest.approx(1.05 * CURVE.step_seconds[1])


@given(curves())
def test_a_curve_survives_json(curve):
    assert StepRateCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ((), (), "must not be empty"),
        ((1, 2), (0.1,), "2 batch_tokens, got 1"),
        ((0, 2), (0.1, 0.2), "strictly increasing, got"),
        ((2, 2), (0.1, 0.2), "strictly increasing, got"),
        ((1, 2), (0.1, 0.0), "at 2 batch tokens must be positive, got 0.0"),
        ((1,), (float("inf"),), "got inf"),
        ((1,), (float("nan"),), "got nan"),
    ],
)
def test_impossible_curves_are_refused(tokens, seconds, message):
    with pytest.raises(ConfigError, match=message):
        StepRateCurve(tokens, seconds)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step_seconds": [0.1]}, "batch_tokens of a step-rate curve must be a list of numbers, got None"),
        ({"batch_tokens": [1], "step_seconds": "0.1"}, "step_seconds .* got '0.1'"),
        ({"batch_tokens": [1], "step_seconds": [None]}, "step_seconds"),
        ({"batch_tokens": [1.5], "step_seconds": [0.1]}, "whole numbers"),
        ({"batch_tokens": [float("nan")], "step_seconds": [0.1]}, "whole numbers"),
        ({"batch_tokens": [True], "step_seconds": [0.1]}, "batch_tokens"),
    ],
)
def test_dictionaries_that_hold_no_curve_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        StepRateCurve.from_dict(data)


@pytest.mark.parametrize(
    "call",
    [
        lambda: CURVE.with_overhead(-1.0),
        lambda: CURVE.observed(0, 0.1),
        lambda: CURVE.observed(1, 0.0),
        lambda: CURVE.observed(1, 0.1, rate=0.0),
        lambda: CURVE.observed(1, 0.1, clip=1.0),
    ],
)
def test_impossible_measurements_are_refused(call):
    with pytest.raises(ConfigError, match="must be"):
        call()
