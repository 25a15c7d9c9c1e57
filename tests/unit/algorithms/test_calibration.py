"""Calibration measures agree with slow definitions; a scaling is recovered from data generated with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.calibration import (
    MAX_LOGIT,
    Calibration,
    ConfidenceScaling,
    calibrate,
    confidence_logits,
    fit_sequential_scaling,
    position_quality,
    sigmoid,
    survival_by_position,
)
from dspark_core.algorithms.calibration_error import (
    area_under_roc,
    brier_score,
    expected_calibration_error,
    reliability_bins,
)
from dspark_core.errors import ConfigError

OUTCOMES = st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=40)


def draw_rounds(
    temperatures: list[float], rounds: int, seed: int = 0, biases: list[float] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits whose true probabilities are sigmoid(logit / temperature + bias): a temperature above 1 or a
    bias below 0 makes an overconfident head."""
    random = np.random.default_rng(seed)
    logits = random.normal(1.0, 2.5, (rounds, len(temperatures)))
    truth = ConfidenceScaling(tuple(temperatures), tuple(biases or [0.0] * len(temperatures)))
    kept = random.random(logits.shape) < truth.confidences(logits)
    accepted = np.cumprod(kept, axis=1).sum(axis=1)
    return logits, accepted, np.full(rounds, len(temperatures))


@pytest.mark.parametrize(
    ("predicted", "observed", "bins", "error"),
    [
        # Two bins: (0.1, 0.2) with one survivor, (0.6, 0.9) with two.
        ([0.9, 0.1, 0.6, 0.2], [1, 1, 1, 0], 2, (abs(0.3 - 1) + abs(1.5 - 2)) / 4),
        ([0.9, 0.1, 0.6, 0.2], [1, 1, 1, 0], 1, abs(1.8 - 3) / 4),
        ([0.9, 0.1, 0.6, 0.2], [1, 1, 1, 0], 4, (0.1 + 0.9 + 0.4 + 0.2) / 4),
        # Equal predictions stay together, however many bins there are.
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], 4, 0.0),
        ([], [], 10, 0.0),
    ],
)
def test_calibration_error_of_known_values(predicted, observed, bins, error):
    assert expected_calibration_error(predicted, observed, bins) == pytest.approx(error)


@given(OUTCOMES, st.integers(1, 20), st.randoms())
def test_calibration_error_is_the_weighted_gap_of_the_diagram(pairs, bins, random):
    predicted, observed = zip(*pairs, strict=True)
    diagram = reliability_bins(predicted, observed, bins)
    assert len(diagram) <= bins
    assert sum(one.count for one in diagram) == len(pairs)
    assert [one.mean_predicted for one in diagram] == sorted(one.mean_predicted for one in diagram)
    gap = sum(one.count * abs(one.mean_predicted - one.mean_observed) for one in diagram) / len(pairs)
    error = expected_calibration_error(predicted, observed, bins)
    assert error == pytest.approx(gap, abs=1e-9)
    assert abs(sum(predicted) - sum(observed)) / len(pairs) - 1e-9 <= error <= 1.0
    shuffled = random.sample(pairs, len(pairs))
    assert expected_calibration_error(*zip(*shuffled, strict=True), bins) == pytest.approx(error, abs=1e-9)


@given(OUTCOMES)
def test_area_under_roc_counts_pairs_in_the_right_order(pairs):
    positives = [p for p, o in pairs if o]
    negatives = [p for p, o in pairs if not o]
    predicted, observed = zip(*pairs, strict=True)
    area = area_under_roc(predicted, observed)
    if not positives or not negatives:
        assert area is None
        return
    wins = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(positives, negatives)]
    assert area == pytest.approx(sum(wins) / len(wins))


def test_brier_score_of_known_values():
    assert brier_score([0.5, 1.0, 0.0], [1, 1, 1]) == pytest.approx((0.25 + 0.0 + 1.0) / 3)


@pytest.mark.parametrize(
    ("predicted", "observed", "message"),
    [
        ([0.5, 0.5], [1], "one length"),
        ([1.5], [1], "predicted must be in \\[0, 1\\], got 1.5"),
        ([float("nan")], [1], "predicted must be in"),
        ([0.5], [0.4], "observed"),
    ],
)
def test_measures_refuse_what_is_no_probability_or_outcome(predicted, observed, message):
    for measure in (expected_calibration_error, area_under_roc, brier_score, reliability_bins):
        with pytest.raises(ValueError, match=message):
            measure(predicted, observed)


@pytest.mark.parametrize(
    ("temperatures", "biases"),
    [
        ([2.0, 2.0, 2.0], [0.0, 0.0, 0.0]),
        ([0.5, 0.5, 0.5], [0.0, 0.0, 0.0]),
        ([1.8, 1.0, 0.6], [-1.5, 0.5, 0.0]),
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),
        ([1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]),
    ],
)
def test_a_known_scaling_is_recovered(temperatures, biases):
    data = draw_rounds(temperatures, 12_000, biases=biases)
    fitted = fit_sequential_scaling(*data)
    assert fitted.temperatures[0] == pytest.approx(temperatures[0], rel=0.1)
    assert fitted.biases[0] == pytest.approx(biases[0], abs=0.1)
    held_out = draw_rounds(temperatures, 40_000, seed=1, biases=biases)
    after = [quality.ece for quality in position_quality(*held_out, fitted)]
    assert max(after) < 0.02
    before = [quality.ece for quality in position_quality(*held_out)]
    is_calibrated = set(temperatures) == {1.0} and not any(biases)
    assert is_calibrated or max(before) > 3 * max(after)


@settings(max_examples=25)
@given(st.data())
def test_no_position_is_worse_than_unscaled_given_the_earlier_ones(data):
    rounds, block = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 3))
    logit = st.floats(-8.0, 8.0)
    logits = np.array([[data.draw(logit) for _ in range(block)] for _ in range(rounds)]).reshape(
        rounds, block
    )
    proposed = np.array([data.draw(st.integers(0, block)) for _ in range(rounds)], dtype=int)
    accepted = np.array([data.draw(st.integers(0, int(limit))) for limit in proposed], dtype=int)
    fitted = fit_sequential_scaling(logits, accepted, proposed)
    for position in range(block):
        rest = block - position
        without = ConfidenceScaling(
            fitted.temperatures[:position] + (1.0,) * rest, fitted.biases[:position] + (0.0,) * rest
        )
        ece = position_quality(logits, accepted, proposed, fitted)[position].ece
        assert ece <= position_quality(logits, accepted, proposed, without)[position].ece


@given(st.lists(st.floats(-15.0, 15.0), min_size=2, max_size=10), st.floats(0.2, 5.0), st.floats(-3.0, 3.0))
def test_scaling_keeps_the_order_within_a_position(logits, temperature, bias):
    ordered = np.sort(logits)
    scaled = ConfidenceScaling((temperature,), (bias,)).confidences(ordered[:, None])[:, 0]
    assert (np.diff(scaled) >= 0).all()
    # Strictly, where doubles can still distinguish the probabilities.
    apart = (np.diff(ordered) > 1e-3) & (np.abs(ordered[1:]) / temperature < 15.0)
    assert (np.diff(scaled) > 0)[apart].all()


def test_what_was_not_proposed_is_not_read():
    logits, accepted, proposed = draw_rounds([2.0, 0.7], 500)
    proposed[::2] = 1
    accepted = np.minimum(accepted, proposed)
    spoiled = logits.copy()
    spoiled[::2, 1] = np.nan
    assert fit_sequential_scaling(spoiled, accepted, proposed) == fit_sequential_scaling(
        logits, accepted, proposed
    )
    assert [len(estimates) for estimates, _ in survival_by_position(spoiled, accepted, proposed)] == [
        500,
        250,
    ]


def test_positions_that_were_never_proposed_are_left_as_they_are():
    logits, accepted, _ = draw_rounds([2.5, 1.0], 2000)
    found = calibrate(logits, np.minimum(accepted, 1), np.ones(2000, dtype=int))
    assert found.scaling.temperatures[0] > 1.5
    assert (found.scaling.temperatures[1], found.scaling.biases[1], found.rounds[1]) == (1.0, 0.0, 0)


def test_positions_that_fewer_rounds_proposed_than_asked_are_left_as_they_are():
    logits, accepted, _ = draw_rounds([2.5, 2.5, 2.5], 2000)
    proposed = np.where(np.arange(2000) < 1500, 3, 1)
    rounds = logits, np.minimum(accepted, proposed), proposed
    found = {least: fit_sequential_scaling(*rounds, least_rounds=least) for least in (1500, 1501)}
    assert found[1500] == fit_sequential_scaling(*rounds)
    assert found[1500].temperatures[1] > 1.2
    assert found[1501].temperatures == (found[1500].temperatures[0], 1.0, 1.0)
    assert found[1501].biases[1:] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("logits", "accepted", "proposed", "message"),
    [
        ([0.0, 1.0], [0, 0], [1, 1], "logits must be \\[rounds, block\\]"),
        ([[0.0], [1.0]], [0], [1], "logits must be"),
        ([[0.0]], [1], [0], "accepted <= proposed"),
        ([[0.0]], [1], [2], "proposed <= block \\(1\\)"),
        ([[float("inf")]], [1], [1], "finite"),
    ],
)
def test_rounds_that_do_not_fit_each_other_are_refused(logits, accepted, proposed, message):
    with pytest.raises(ValueError, match=message):
        fit_sequential_scaling(logits, accepted, proposed)


def test_temperatures_must_fit_the_block():
    with pytest.raises(ValueError, match="one value for each of 2, got 1"):
        position_quality([[0.0, 0.0]], [1], [2], ConfidenceScaling((1.0,), (0.0,)))


@given(st.lists(st.floats(1e-6, 1.0 - 1e-6), min_size=1, max_size=8))
def test_logits_invert_confidences(confidences):
    back = sigmoid(confidence_logits(confidences))
    assert back == pytest.approx(confidences, rel=1e-9)


def test_certainty_becomes_a_finite_logit():
    assert confidence_logits([0.0, 1.0]).tolist() == [-MAX_LOGIT, MAX_LOGIT]
    with pytest.raises(ValueError, match=r"confidences must be in \[0, 1\], got -0.1"):
        confidence_logits([-0.1])


def test_calibration_survives_its_dictionary():
    found = calibrate(*draw_rounds([1.7, 0.8], 3000))
    assert Calibration.from_dict(found.to_dict()) == found
    assert Calibration.from_dict({**found.to_dict(), "written_by": "a later version"}) == found
    assert max(found.ece_after) < max(found.ece_before)
    without = {name: value for name, value in found.to_dict().items() if name != "biases"}
    assert Calibration.from_dict(without).scaling.biases == (0.0, 0.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperatures", [1.0, 0.0], "temperatures must be positive numbers, got 0.0"),
        ("temperatures", [1.0, float("nan")], "temperatures must be positive"),
        ("temperatures", [], "temperatures of a calibration must not be empty"),
        ("temperatures", "11", "temperatures must be a list of numbers, got '11'"),
        ("temperatures", [1.0, True], "temperatures must be a list of numbers"),
        ("biases", [1.0], "biases must have one value for each of 2 temperatures, got 1"),
        ("biases", [0.0, float("inf")], "biases must be finite numbers, got inf"),
        ("rounds", [1], "rounds must have one value for each of 2 temperatures, got 1"),
        ("rounds", [1, 1.5], "rounds must be whole numbers"),
        ("ece_before", None, "ece_before must be a list of numbers, got None"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    good = Calibration(
        scaling=ConfidenceScaling((1.0, 2.0), (0.0, -0.5)),
        rounds=(5, 4),
        ece_before=(0.1, 0.2),
        ece_after=(0.0, 0.1),
    ).to_dict()
    with pytest.raises(ConfigError, match=message):
        Calibration.from_dict({**good, field: value})
