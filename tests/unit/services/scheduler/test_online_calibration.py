"""Confidences that do not fit are noticed, refitted from outcomes, and used only when that helps."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.survival_scaling import scaled
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime, VerifyPlan
from services.scheduler.planning.calibration import (
    MAX_MODELS,
    MIN_ROUNDS,
    CalibrationBook,
    CalibrationState,
    conditional_confidences,
    examine,
)
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.documents import MemoryDocumentStore
from services.verifier.plans import scaling_of

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
PROFILE = (StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=0.02),)


def _rounds(count: int, *, overconfidence: float, block: int = 4, seed: int = 3) -> list[RequestSurvival]:
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
            )
        )
    return found


def test_confidences_that_fit_are_left_alone():
    state = examine(_rounds(3000, overconfidence=0.0))
    assert state.error < 0.05
    assert state.scaling is None
    assert not state.drifted


def test_overconfidence_is_found_corrected_and_an_alarm():
    state = examine(_rounds(3000, overconfidence=1.5))
    assert state.drifted
    assert state.scaled_error < state.error / 3
    assert state.scaling is not None
    assert state.scaling.biases[0] == pytest.approx(-1.5, abs=0.4)


def test_of_too_many_models_the_one_that_was_not_heard_of_for_longest_is_forgotten():
    book = CalibrationBook(MemoryDocumentStore())
    for number in range(MAX_MODELS):
        book.observe(f"m{number}", [])
        book.learned(f"m{number}", CalibrationState(error=0.2, scaled_error=0.1))
    book.observe("m0", [])
    book.observe("another", [])
    assert "m0" in book.states()
    assert "m1" not in book.states()


def test_conditional_confidences_invert_the_product():
    confidences = np.array([[0.9, 0.5, 0.25], [1.0, 0.0, 0.7]])
    found = conditional_confidences(np.cumprod(confidences, axis=1))
    assert found[0] == pytest.approx(confidences[0])
    assert found[1] == pytest.approx([1.0, 0.0, 0.0])  # nothing survived: any value will do


def test_rounds_are_looked_at_once_they_are_many_and_the_window_is_bounded():
    book = CalibrationBook(MemoryDocumentStore())
    book.observe("m", _rounds(MIN_ROUNDS - 1, overconfidence=0.0))
    assert book.due() == []
    undrafted = RequestSurvival(sequence_id="x", survival=(), verify_length=0, accepted=0)
    book.observe("m", [undrafted] * 10)
    assert book.due() == []
    for _ in range(10):
        book.observe("m", _rounds(MIN_ROUNDS, overconfidence=0.0))
    ((model, rounds),) = book.due()
    assert (model, len(rounds)) == ("m", 4096)
    assert book.due() == []


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
    assert plans[0].temperatures == ()
    scaling = scaling_of(plans[-1])
    assert scaling is not None
    assert metrics.get_sample_value("dspark_scheduler_calibration_drift", {"model": "m"}) == 1
    assert metrics.get_sample_value("dspark_scheduler_rescaling", {"model": "m"}) == 1

    # The verifier's arithmetic is that of the fit.
    survival = _rounds(1, overconfidence=1.5, seed=5)[0].survival
    (request,) = scaled([PlanRequest(survival=survival)], scaling)
    conditional = conditional_confidences(np.array([survival]))
    logits = np.log(conditional) - np.log1p(-conditional)
    assert list(request.survival) == pytest.approx(np.cumprod(scaling.confidences(logits)[0]).tolist())
    assert list(request.survival) == sorted(request.survival, reverse=True)
    assert request.survival[0] < survival[0]


def test_a_scaling_that_cannot_be_used_is_not():
    plan = VerifyPlan(based_on_round=1, draft_token_capacity=1, temperatures=(0.0,), biases=(0.0,))
    assert scaling_of(plan) is None
    requests = [PlanRequest(survival=(1.0, 0.0, 0.0)), PlanRequest(survival=())]
    assert scaled(requests, None) is requests
    good = VerifyPlan(based_on_round=1, draft_token_capacity=1, temperatures=(2.0,), biases=(0.1,))
    (certain, empty) = scaled(requests, scaling_of(good))
    assert certain.survival[1:] == (0.0, 0.0)
    assert 0.99 < certain.survival[0] <= 1.0
    assert empty.survival == ()
