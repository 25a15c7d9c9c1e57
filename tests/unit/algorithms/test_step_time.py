"""Step time over requests, tokens and context: interpolation, learning, JSON."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import MAX_POINTS, StepTimeModel, monotone
from dspark_core.errors import ConfigError
from dspark_core.records import ReplicaKind

CURVE = StepTimeModel.of_curve((1, 5, 9), (0.010, 0.010, 0.018))
KEY = ReplicaKind(model="m", engine="native", hardware="cpu, 2 threads", dtype="bfloat16")
GRID = [(r, r * t) for r in (1, 4, 16) for t in (1, 2, 8)]


def linear(requests, tokens, context=0):
    """Step time of idealised, linear hardware."""
    return 0.010 + 0.0004 * tokens + 0.0007 * requests + 1e-7 * context + 1e-8 * tokens * context / requests


def profiled(seconds=linear, long=((1, 1), (4, 32))):
    points = [StepPoint(r, b, 128 * r, seconds(r, b, 128 * r)) for r, b in GRID]
    points += [StepPoint(r, b, 1024 * r, seconds(r, b, 1024 * r)) for r, b in long]
    return StepTimeModel(tuple(points), KEY)


@pytest.mark.parametrize(
    ("batch_tokens", "seconds"),
    [(1, 0.010), (3, 0.010), (5, 0.010), (6, 0.012), (9, 0.018), (10, 0.020), (109, 0.218)],
)
@pytest.mark.parametrize("requests", [1, 7])
def test_an_old_curve_is_interpolated_as_before(batch_tokens, seconds, requests):
    assert CURVE.seconds(requests, batch_tokens, 500) == pytest.approx(seconds)


def test_the_ends_stay_level_where_nothing_else_is_known():
    falling = StepTimeModel.of_curve((4, 8), (0.02, 0.01))
    assert falling.seconds(1, 1) == pytest.approx(0.02)
    assert falling.seconds(1, 10_000) == pytest.approx(0.01)
    assert StepTimeModel.of_curve((4,), (0.02,)).seconds(1, 100) == pytest.approx(0.02)


@given(st.integers(1, 64), st.floats(1, 8), st.integers(0, 2000))
def test_linear_hardware_is_known_everywhere_from_a_few_points(requests, per_request, context):
    tokens = round(requests * per_request)
    expected = linear(requests, tokens, context * requests)
    assert profiled().seconds(requests, tokens, context * requests) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 40))
def test_a_table_holds_what_single_questions_answer(tokens, requests):
    model, tokens = profiled(), sorted(tokens)
    table = model.table(requests, tokens, 128 * requests)
    for count, seconds in zip(tokens, table, strict=True):
        assert seconds == pytest.approx(model.seconds(requests, count, 128 * requests))


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 8]), st.integers(1, 60), st.floats(1e-3, 1.0)),
        min_size=1,
        max_size=12,
        unique_by=lambda point: point[:2],
    )
)
def test_a_model_passes_through_its_points(points):
    model = StepTimeModel(tuple(StepPoint(r, b, 0, s) for r, b, s in points))
    for requests, tokens, seconds in points:
        assert model.seconds(requests, tokens) == pytest.approx(seconds)


@given(st.integers(1, 512), st.integers(1, 100_000), st.integers(0, 7))
def test_any_step_can_be_the_first_that_is_learned_from(requests, context, drafted):
    """Its context per request times its requests is not always its context, in the last bit."""
    model = StepTimeModel.learn(requests, requests + drafted, context, 0.01)
    assert model.seconds(requests, requests + drafted, context) == pytest.approx(0.01)


learned_steps = st.tuples(st.integers(1, 32), st.integers(0, 64), st.floats(1e-3, 1.0))


@given(st.lists(learned_steps, min_size=1, max_size=12))
def test_no_time_falls_below_what_was_measured(steps):
    """Rows of points are continued beside each other, however steep or noisy one of them is."""
    points, fastest = {}, math.inf
    for requests, drafted, seconds in steps:
        points[requests, requests + drafted] = StepPoint(requests, requests + drafted, 0, seconds)
        fastest = min(fastest, seconds)
    model = StepTimeModel(tuple(points.values()))
    least = min(point.seconds for point in points.values())
    for requests in range(1, 34):
        assert model.table(requests, range(requests, 100)).min() >= least * (1 - 1e-9)


def test_a_steep_row_does_not_make_the_next_one_cheap():
    """Learned from three live steps; between the rows nothing was measured."""
    points = (1, 1, 0.0070), (1, 2, 0.0095), (24, 38, 0.0550)
    model = StepTimeModel(tuple(StepPoint(requests, tokens, 0, time) for requests, tokens, time in points))
    times = [model.seconds(requests, requests) for requests in range(1, 25)]
    assert times == sorted(times)


def test_a_stair_stays_at_its_batch_tokens_between_measured_request_counts():
    def padded(requests, tokens, context):
        return 0.01 * math.ceil(tokens / 16) + 0.001 * requests

    points = [StepPoint(r, b, 0, padded(r, b, 0)) for r in (2, 8) for b in (8, 15, 16, 17, 31, 32)]
    model = StepTimeModel(tuple(points))
    assert model.seconds(5, 16) == pytest.approx(0.015)
    assert model.seconds(5, 17) == pytest.approx(0.025)


def test_long_contexts_never_make_time_vanish():
    model = profiled()
    assert model.seconds(1, 8, 0) > 0
    assert model.seconds(16, 16, 1) > 0


@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
def test_a_slower_machine_is_followed_as_a_whole(tokens):
    model, truth = profiled(), profiled()
    for _ in range(300):
        model = model.observed(4, 16, 512, 3 * linear(4, 16, 512))
    assert model.seconds(4, 16, 512) == pytest.approx(3 * linear(4, 16, 512), rel=0.01)
    assert model.seconds(2, tokens, 256) == pytest.approx(3 * truth.seconds(2, tokens, 256), rel=0.05)


def test_a_wrong_point_is_corrected_without_the_others():
    model = profiled()
    for _ in range(1500):  # one token is as fast as measured, eight take twice as long
        model = model.observed(1, 1, 128, linear(1, 1, 128))
        model = model.observed(1, 8, 128, 2 * linear(1, 8, 128))
    assert model.seconds(1, 1, 128) == pytest.approx(linear(1, 1, 128), rel=0.1)
    assert model.seconds(1, 8, 128) == pytest.approx(2 * linear(1, 8, 128), rel=0.1)


def test_a_wrong_point_is_mostly_corrected_within_a_dozen_visits():
    """With plain decoding in between, on a machine that takes 1.5 times as long as when it was profiled."""
    model = profiled()
    for _ in range(12):
        for _ in range(3):
            model = model.observed(1, 1, 128, 1.5 * linear(1, 1, 128))
        model = model.observed(1, 8, 128, 1.5 * 1.4 * linear(1, 8, 128))
    ratio = model.seconds(1, 8, 128) / model.seconds(1, 1, 128) * linear(1, 1, 128) / linear(1, 8, 128)
    assert 1.18 < ratio < 1.45


def test_a_point_that_no_plan_visits_again_does_not_stay_dear():
    model = profiled()
    for _ in range(200):
        model = model.observed(1, 1, 128, linear(1, 1, 128))
        model = model.observed(1, 8, 128, 4 * linear(1, 8, 128))
    dear = model.seconds(1, 8, 128)
    for _ in range(3000):
        model = model.observed(1, 1, 128, linear(1, 1, 128))
    assert dear > 1.5 * linear(1, 8, 128)
    assert model.seconds(1, 8, 128) == pytest.approx(linear(1, 8, 128), rel=0.05)


def test_one_stall_moves_the_model_by_a_bounded_share():
    assert profiled().observed(4, 16, 512, 1e6).seconds(4, 16, 512) < 1.1 * linear(4, 16, 512)


def test_observing_leaves_the_old_model():
    model = profiled()
    model.observed(4, 16, 512, 1.0)
    assert model == profiled()


def test_a_model_without_a_profile_learns_from_live_steps():
    model = StepTimeModel.learn(1, 1, 128, 0.02)
    shapes = [(1, 1), (1, 4), (1, 8), (4, 4), (4, 16), (4, 32), (8, 40)]
    for index in range(4000):
        requests, tokens = shapes[index % len(shapes)]
        model = model.observed(requests, tokens, 128 * requests + index, linear(requests, tokens))
    for requests, tokens in shapes:
        assert model.seconds(requests, tokens) == pytest.approx(linear(requests, tokens), rel=0.1)


def test_learning_every_shape_stays_bounded():
    model = StepTimeModel.learn(1, 1, 0, 0.01)
    for requests in range(1, 60):
        for tokens in range(requests, 40 * requests, 3 * requests):
            model = model.observed(requests, tokens, 0, 0.01)
    assert len(model.points) <= MAX_POINTS


@settings(max_examples=30)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12))
def test_repaired_seconds_never_fall_and_keep_their_mean(seconds):
    repaired = monotone(seconds)
    assert list(repaired) == sorted(repaired)
    assert sum(repaired) == pytest.approx(sum(seconds))


def test_a_round_pays_for_drafts_and_the_network_only_when_it_drafts():
    model = RoundTimeModel(CURVE, DraftTimeModel((1, 3), (0.004, 0.008)), 0.002)
    assert model.seconds(4, 4) == pytest.approx(0.010)
    assert model.seconds(4, 5, drafted=2) == pytest.approx(0.010 + 0.006 + 0.002)
    assert model.seconds(4, 5, drafted=5) == pytest.approx(0.010 + 0.012 + 0.002)
    assert model.table(4, 2, 0, drafted=1)[1] == pytest.approx(0.016)
    assert model.overhead_table(5) == pytest.approx([0, 0.006, 0.008, 0.010, 0.012, 0.014])


def test_draft_and_network_time_are_learned_apart():
    model = RoundTimeModel(CURVE)
    assert model.overhead_seconds(3) == 0.0
    for _ in range(300):
        model = model.observed_draft(2, 0.015, compute_seconds=0.010)
    assert model.draft.seconds(2) == pytest.approx(0.010)
    assert model.network_seconds == pytest.approx(0.005)
    for _ in range(300):
        model = model.observed_draft(2, 0.025)
    assert model.overhead_seconds(2) == pytest.approx(0.025, rel=0.01)


@given(st.floats(0.5, 2.0), st.booleans())
def test_models_survive_json(scale, learned):
    verify = StepTimeModel(profiled().points, KEY, learned, scale).observed(4, 16, 512, 0.05)
    model = RoundTimeModel(verify, DraftTimeModel((1, 4), (0.004, 0.006)), 0.001)
    again = RoundTimeModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again.draft == model.draft
    assert again.network_seconds == model.network_seconds
    assert again.verify.key == KEY
    assert again.seconds(5, 20, 640, 3) == pytest.approx(model.seconds(5, 20, 640, 3))


def test_old_documents_convert():
    old = {"batch_tokens": [1, 5, 9], "step_seconds": [0.010, 0.010, 0.018]}
    assert StepTimeModel.from_dict(old) == CURVE
    assert RoundTimeModel.from_dict(old) == RoundTimeModel(CURVE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "points of a step-time model must be a list, got None"),
        ({"points": []}, "points of a step-time model must not be empty"),
        ({"points": [[1, 1, 0]]}, "points must be"),
        ({"points": [[1, 1.5, 0, 0.1]]}, "whole numbers"),
        ({"points": [[1, 1, 0, "0.1"]]}, "must hold numbers, got '0.1'"),
        ({"points": [[0, 1, 0, 0.1]]}, "requests of a step must be >= 1, got 0"),
        ({"points": [[1, 0, 0, 0.1]]}, "batch_tokens of a step must be >= 1, got 0"),
        ({"points": [[1, 1, -1, 0.1]]}, "context_tokens of a step must be >= 0"),
        ({"points": [[1, 1, 0, 0.0]]}, "must be positive, got 0.0"),
        ({"points": [[1, 1, 0, float("nan")]]}, "must be positive, got nan"),
        ({"points": [[1, 1, 0, 0.1], [1, 1, 0, 0.2]]}, "points must differ, got 2 of 1 requests"),
        ({"points": [[1, 1, 0, 0.1]], "scale": 0.0}, "scale of a step-time model must be positive"),
        ({"points": [[1, 1, 0, 0.1]], "corrections": [0.1, 0.2]}, "one value for each of 1 points, got 2"),
        ({"points": [[1, 1, 0, 0.1]], "key": {"model": 3}}, "key of a step-time model"),
        ({"batch_tokens": [1, 2], "step_seconds": [0.1]}, "2 batch_tokens, got 1"),
        ({"batch_tokens": [1], "step_seconds": [True]}, "step_seconds of a step-time model"),
    ],
)
def test_documents_that_hold_no_model_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        StepTimeModel.from_dict(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DraftTimeModel((1,), ()), "1 requests, got 0"),
        (lambda: DraftTimeModel((2, 1), (0.1, 0.1)), "strictly increasing"),
        (lambda: DraftTimeModel((1,), (-0.1,)), "draft_seconds must be >= 0"),
        (lambda: DraftTimeModel().observed(0, 0.1), "must be >= 1, got 0"),
        (lambda: RoundTimeModel(CURVE, network_seconds=-1.0), "network_seconds must be >= 0"),
        (lambda: RoundTimeModel.from_dict({"verify": 3}), "must be objects"),
        (lambda: CURVE.observed(1, 1, 0, 0.0), "must be positive, got 0.0"),
    ],
)
def test_impossible_times_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
