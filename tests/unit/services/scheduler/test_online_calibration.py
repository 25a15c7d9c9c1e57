"""Confidences that do not fit are noticed, refitted from outcomes, and used only when that helps."""

from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.survival_scaling import banded, scaled
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, ScalingBand, StepTime
from services.scheduler.planning.calibration import (
    MAX_MODELS,
    MEMORY_ROUNDS,
    MIN_ROUNDS,
    RETRY_ROUNDS,
    WINDOW_ROUNDS,
    CalibrationBook,
    CalibrationState,
    Traffic,
    conditional_confidences,
    examine,
)
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.documents import MemoryDocumentStore

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
PROFILE = (StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=0.02),)


GREEDY = Traffic("m", "0")


def _rounds(
    count: int, *, overconfidence: float, block: int = 4, seed: int = 3, temperature: float = 0.0
) -> list[RequestSurvival]:
    """Told confidences whose logits are too high by `overconfidence`; outcomes follow the true ones."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        logits = generator.normal(0.8, 1.2, block)
        true = 1 / (1 + np.exp(-logits))
        told = 1 / (1 + np.exp(-(logits + overconfidence)))
        stands = generator.random(block) < true
        accepted = block if stands.all() else int(np.argmin(stands))
        found.append(
            RequestSurvival(
                sequence_id=str(index),
                survival=tuple(np.cumprod(told).tolist()),
                verify_length=block,
                accepted=accepted,
                temperature=temperature,
            )
        )
    return found


OVERCONFIDENT = _rounds(3000, overconfidence=1.5)


def test_confidences_that_fit_are_left_alone():
    state = examine(_rounds(3000, overconfidence=0.0))
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
    book = CalibrationBook(MemoryDocumentStore())
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
    book = CalibrationBook(MemoryDocumentStore())
    book.observe("m", "v", _rounds(MIN_ROUNDS - 1, overconfidence=0.0))
    assert book.due() == []
    undrafted = RequestSurvival(sequence_id="x", survival=(), verify_length=0, accepted=0)
    book.observe("m", "v", [undrafted] * 10)
    assert book.due() == []
    for _ in range(10):
        book.observe("m", "v", _rounds(MIN_ROUNDS, overconfidence=0.0))
    ((traffic, rounds),) = book.due()
    assert (traffic, len(rounds)) == (GREEDY, 4096)
    assert book.due() == []


REFUSED = [replace(one, sequence_id="broken", accepted=0) for one in OVERCONFIDENT]


@pytest.mark.parametrize("good", [1, 3])
def test_no_verifier_decides_for_all_others(good: int):
    """One that is broken may refuse every draft; the others would stop to speculate."""
    book = CalibrationBook(MemoryDocumentStore())
    for index in range(good):
        book.observe("m", f"good{index}", _rounds(4000, overconfidence=0.0, seed=index))
    for _ in range(3):
        book.observe("m", "broken", REFUSED)
    ((_, outcomes),) = book.due()
    broken = sum(one.sequence_id == "broken" for one in outcomes)
    assert (len(outcomes), broken) == (WINDOW_ROUNDS, WINDOW_ROUNDS // (good + 1))


def test_a_verifier_that_gives_no_more_outcomes_is_forgotten():
    book = CalibrationBook(MemoryDocumentStore())
    book.observe("m", "gone", REFUSED[:100])
    for told, left in ((MEMORY_ROUNDS // 2, 100), (MEMORY_ROUNDS, 0)):
        for _ in range(told // WINDOW_ROUNDS):
            book.observe("m", "v", [OVERCONFIDENT[0]] * WINDOW_ROUNDS)
        ((_, outcomes),) = book.due()
        assert sum(one.sequence_id == "broken" for one in outcomes) == left


async def test_a_scaling_under_which_nothing_is_verified_is_tried_without():
    """Nothing else could show that it is wrong."""
    metrics = CollectorRegistry()
    scheduler = Scheduler(metrics=metrics)
    labels = {"model": "m", "temperature": "0"}
    undrafted = (RequestSurvival(sequence_id="x", survival=(), verify_length=0, accepted=0),) * 4096

    async def reports():
        yield RoundReport(replica_id="v", round=1, requests=tuple(REFUSED), kind=KIND, profile=PROFILE)
        await scheduler.examine_calibration()
        assert metrics.get_sample_value("dspark_scheduler_rescaling", labels) == 1
        for number in range(RETRY_ROUNDS // 4096):
            await scheduler.examine_calibration()
            assert metrics.get_sample_value("dspark_scheduler_rescaling", labels) == 1
            yield RoundReport(replica_id="v", round=number + 2, requests=undrafted)
        await scheduler.examine_calibration()

    await scheduler.listen(reports())
    assert metrics.get_sample_value("dspark_scheduler_rescaling", labels) == 0


def test_temperatures_are_judged_apart():
    book = CalibrationBook(MemoryDocumentStore())
    for temperature, overconfidence in ((0.0, 0.0), (0.5, 0.0), (1.0, 2.0)):
        book.observe("m", "v", _rounds(3000, overconfidence=overconfidence, temperature=temperature))
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


async def test_every_band_survives_a_change_of_leaders():
    class Kept(MemoryDocumentStore):
        def __init__(self) -> None:
            self.documents: dict[str, str] = {}

        async def load(self) -> dict[str, str]:
            return self.documents

        async def save(self, documents: dict[str, str], term: int) -> bool:
            self.documents.update(documents)
            return True

    store = Kept()
    before, after = CalibrationBook(store), CalibrationBook(store)
    before.observe("m", "v", [])
    for band, error in (("0", 0.2), ("above 0.5", 0.3)):
        before.learned(Traffic("m", band), CalibrationState(error=error, scaled_error=0.1))
    await before.save(1)
    await after.load()
    assert after.states() == before.states()
    assert len(after.states()) == 2


async def test_plans_bring_the_scaling_of_their_model_to_the_verifier():
    metrics = CollectorRegistry()
    scheduler = Scheduler(metrics=metrics)

    async def reports():
        for number, request in enumerate(_rounds(1500, overconfidence=1.5), start=1):
            first = number == 1
            yield RoundReport(
                replica_id="v",
                round=number,
                requests=(request,),
                batch_tokens=5,
                step_seconds=0.02,
                kind=KIND if first else None,
                profile=PROFILE if first else (),
            )
            if number == 1400:
                await scheduler.examine_calibration()

    plans = [plan async for plan in scheduler.coordinate(reports())]
    assert plans[0].scalings == ()
    scaling = banded(plans[-1].scalings)
    assert scaling is not None
    labels = {"model": "m", "temperature": "0"}
    assert metrics.get_sample_value("dspark_scheduler_calibration_drift", labels) == 1
    assert metrics.get_sample_value("dspark_scheduler_rescaling", labels) == 1

    # The verifier's arithmetic is that of the fit.
    survival = _rounds(1, overconfidence=1.5, seed=5)[0].survival
    (request,) = scaled([PlanRequest(survival=survival)], scaling)
    conditional = conditional_confidences(np.array([survival]))
    logits = np.log(conditional) - np.log1p(-conditional)
    assert list(request.survival) == pytest.approx(
        np.cumprod(scaling.at(0.0).confidences(logits)[0]).tolist()
    )
    assert list(request.survival) == sorted(request.survival, reverse=True)
    assert request.survival[0] < survival[0]


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
