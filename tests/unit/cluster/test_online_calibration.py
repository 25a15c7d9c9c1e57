"""Confidences that do not fit are noticed, refitted from outcomes, and used only when that helps."""

from dataclasses import replace

import numpy as np
import pytest

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.survival_scaling import banded, scaled
from dspark_core.cluster.planning.calibration import (
    MAX_MODELS,
    MEMORY_ROUNDS,
    MIN_ROUNDS,
    WINDOW_ROUNDS,
    CalibrationBook,
    CalibrationState,
    Traffic,
    conditional_confidences,
    examine,
)
from dspark_core.records import RequestSurvival, ScalingBand
from tests.unit.cluster.outcomes import OVERCONFIDENT, REFUSED, drawn_outcomes

GREEDY = Traffic("m", "0")


def test_confidences_that_fit_are_left_alone():
    state = examine(drawn_outcomes(3000, overconfidence=0.0))
    assert state.error < 0.05
    assert state.scaling is None
    assert not state.drifted


def test_overconfidence_is_found_corrected_and_an_alarm():
    state = examine(OVERCONFIDENT)
    assert state.drifted
    assert state.scaled_error < state.error / 3
    assert state.scaling is not None
    assert state.scaling.biases[0] == pytest.approx(-1.5, abs=0.4)


@pytest.mark.parametrize("times", [20, 100])
def test_a_position_that_was_seldom_judged_keeps_its_confidences(times: int):
    """Refused each of a few times, it would be given up: never verified again, it would never be judged."""
    short = [replace(one, verify_length=3, accepted=min(one.accepted, 3)) for one in OVERCONFIDENT]
    long = [replace(request, verify_length=4, accepted=3) for request in OVERCONFIDENT[:times]]
    scaling = examine(short + long).scaling
    assert scaling is not None
    assert set(zip(scaling.temperatures[3:], scaling.biases[3:], strict=True)) <= {(1.0, 0.0)}
    assert scaling.biases[2] < -0.5


def test_one_block_of_absurd_length_is_not_what_an_examination_costs():
    """A row as long for each outcome would take gigabytes."""
    longest = replace(OVERCONFIDENT[0], survival=(0.5,) * 2**20)
    assert examine([*OVERCONFIDENT, longest]).scaling is not None


def test_of_too_many_models_the_one_that_was_not_heard_of_for_longest_is_forgotten():
    book = CalibrationBook()
    for number in range(MAX_MODELS):
        book.observe(f"m{number}", "v", [])
        book.learned(Traffic(f"m{number}", "0"), CalibrationState(error=0.2, scaled_error=0.1))
    book.observe("m0", "v", [])
    book.observe("another", "v", [])
    models = {traffic.model for traffic in book.states()}
    assert "m0" in models
    assert "m1" not in models


def test_conditional_confidences_invert_the_product():
    confidences = np.array([[0.9, 0.5, 0.25], [1.0, 0.0, 0.7]])
    found = conditional_confidences(np.cumprod(confidences, axis=1))
    assert found[0] == pytest.approx(confidences[0])
    assert found[1] == pytest.approx([1.0, 0.0, 0.0])  # nothing survived: any value will do


def test_rounds_are_looked_at_once_they_are_many_and_the_window_is_bounded():
    book = CalibrationBook()
    book.observe("m", "v", drawn_outcomes(MIN_ROUNDS - 1, overconfidence=0.0))
    assert book.due() == []
    undrafted = RequestSurvival(sequence_id="x", survival=(), verify_length=0, accepted=0)
    book.observe("m", "v", [undrafted] * 10)
    assert book.due() == []
    for _ in range(10):
        book.observe("m", "v", drawn_outcomes(MIN_ROUNDS, overconfidence=0.0))
    ((traffic, rounds),) = book.due()
    assert (traffic, len(rounds)) == (GREEDY, 4096)
    assert book.due() == []


@pytest.mark.parametrize("good", [1, 3])
def test_no_verifier_decides_for_all_others(good: int):
    """One that is broken may refuse every draft; the others would stop to speculate."""
    book = CalibrationBook()
    for index in range(good):
        book.observe("m", f"good{index}", drawn_outcomes(4000, overconfidence=0.0, seed=index))
    for _ in range(3):
        book.observe("m", "broken", REFUSED)
    ((_, outcomes),) = book.due()
    broken = sum(one.sequence_id == "broken" for one in outcomes)
    assert (len(outcomes), broken) == (WINDOW_ROUNDS, WINDOW_ROUNDS // (good + 1))


def test_a_verifier_that_gives_no_more_outcomes_is_forgotten():
    book = CalibrationBook()
    book.observe("m", "gone", REFUSED[:100])
    for told, left in ((MEMORY_ROUNDS // 2, 100), (MEMORY_ROUNDS, 0)):
        for _ in range(told // WINDOW_ROUNDS):
            book.observe("m", "v", [OVERCONFIDENT[0]] * WINDOW_ROUNDS)
        ((_, outcomes),) = book.due()
        assert sum(one.sequence_id == "broken" for one in outcomes) == left


def test_temperatures_are_judged_apart():
    book = CalibrationBook()
    for temperature, overconfidence in ((0.0, 0.0), (0.5, 0.0), (1.0, 2.0)):
        book.observe("m", "v", drawn_outcomes(3000, overconfidence=overconfidence, temperature=temperature))
    for traffic, rounds in book.due():
        book.learned(traffic, examine(rounds))
    greedy, cool, warm = book.scalings("m")
    assert (greedy.temperatures, cool.temperatures) == ((), ())
    assert warm.biases[0] == pytest.approx(-2.0, abs=0.5)

    scaling = banded(book.scalings("m"))
    told = PlanRequest(survival=(0.9, 0.8))
    sampled = PlanRequest(survival=(0.9, 0.8), temperature=0.7)
    kept, lowered = scaled([told, sampled], scaling)
    assert kept is told
    assert lowered.survival[0] < 0.7


def test_every_band_survives_a_change_of_leaders():
    before, after = CalibrationBook(), CalibrationBook()
    before.observe("m", "v", [])
    for band, error in (("0", 0.2), ("above 0.5", 0.3)):
        before.learned(Traffic("m", band), CalibrationState(error=error, scaled_error=0.1))
    for model, document in before.documents().items():
        after.take(model, document)
    assert after.states() == before.states()
    assert len(after.states()) == 2


def _band(temperatures: tuple[float, ...], biases: tuple[float, ...]) -> list[ScalingBand]:
    return [ScalingBand(up_to_temperature=float("inf"), temperatures=temperatures, biases=biases)]


def test_a_scaling_that_cannot_be_used_is_not():
    assert banded(_band((0.0,), (0.0,))) is None
    requests = [PlanRequest(survival=(1.0, 0.0, 0.0)), PlanRequest(survival=())]
    assert scaled(requests, None) is requests
    (certain, empty) = scaled(requests, banded(_band((2.0,), (0.1,))))
    assert certain.survival[1:] == (0.0, 0.0)
    assert 0.99 < certain.survival[0] <= 1.0
    assert empty.survival == ()
