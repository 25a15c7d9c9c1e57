"""Scalings found online go to the verifiers of their model, and are dropped again."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.survival_scaling import banded, scaled
from dspark_core.cluster.planning.calibration import RETRY_ROUNDS, conditional_confidences
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime
from services.scheduler.scheduler import Scheduler
from tests.unit.cluster.outcomes import REFUSED, drawn_outcomes

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
PROFILE = (StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=0.02),)


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


async def test_plans_bring_the_scaling_of_their_model_to_the_verifier():
    metrics = CollectorRegistry()
    scheduler = Scheduler(metrics=metrics)

    async def reports():
        for number, request in enumerate(drawn_outcomes(1500, overconfidence=1.5), start=1):
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
    survival = drawn_outcomes(1, overconfidence=1.5, seed=5)[0].survival
    (request,) = scaled([PlanRequest(survival=survival)], scaling)
    conditional = conditional_confidences(np.array([survival]))
    logits = np.log(conditional) - np.log1p(-conditional)
    assert list(request.survival) == pytest.approx(
        np.cumprod(scaling.at(0.0).confidences(logits)[0]).tolist()
    )
    assert list(request.survival) == sorted(request.survival, reverse=True)
    assert request.survival[0] < survival[0]
