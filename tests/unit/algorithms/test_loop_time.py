"""A round's time outside its pass is learned as a constant per round and one per request."""

from __future__ import annotations

import random

import pytest

from dspark_core.algorithms.loop_time import LoopTimeModel
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import plan_lengths
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.errors import ConfigError

ROUND, REQUEST = 0.0008, 0.00015


def learned(rounds: int, stalls: float = 0.0) -> LoopTimeModel:
    rng, model = random.Random(3), LoopTimeModel()
    for _ in range(rounds):
        requests = rng.choice((1, 4, 16, 32))
        seconds = (ROUND + REQUEST * requests) * rng.uniform(0.9, 1.1)
        model = model.observed(requests, seconds if rng.random() >= stalls else 0.5)
    return model


@pytest.mark.parametrize("requests", [1, 4, 16, 32])
def test_rounds_of_any_size_are_foretold(requests: int) -> None:
    assert learned(2000).seconds(requests) == pytest.approx(ROUND + REQUEST * requests, rel=0.1)


@pytest.mark.parametrize("requests", [4, 32])
def test_a_stall_now_and_then_is_not_believed(requests: int) -> None:
    assert learned(2000, stalls=0.02).seconds(requests) == pytest.approx(ROUND + REQUEST * requests, rel=0.3)


def test_it_is_part_of_every_round_and_of_its_document() -> None:
    model = RoundTimeModel(StepTimeModel.of_curve((1, 8), (0.01, 0.01)), loop=LoopTimeModel(0.002, 0.001))
    assert model.seconds(4, 4) == pytest.approx(0.016)
    assert model.table(4, 2).tolist() == pytest.approx([0.016] * 3)
    assert RoundTimeModel.from_dict(model.to_dict()) == model


def test_a_dearer_round_should_bring_more_tokens() -> None:
    """With 0.018 s added to every round, the third token becomes worth verifying."""
    curve = StepTimeModel.of_curve((1, 2, 3, 4), (0.020, 0.021, 0.022, 0.026))
    asked = [PlanRequest(sequence_id="a", survival=(0.8, 0.5, 0.3))]
    assert plan_lengths(asked, RoundTimeModel(curve)) == (2,)
    assert plan_lengths(asked, RoundTimeModel(curve, loop=LoopTimeModel(0.018))) == (3,)


@pytest.mark.parametrize(("requests", "seconds"), [(-1, 0.1), (1, -0.1), (1, float("nan"))])
def test_impossible_rounds_are_refused(requests: int, seconds: float) -> None:
    with pytest.raises(ConfigError, match="an observed loop needs"):
        LoopTimeModel().observed(requests, seconds)


def test_impossible_times_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="request_seconds of a loop-time model must be >= 0, got -1"):
        LoopTimeModel(0.0, -1.0)
    document = RoundTimeModel(StepTimeModel.of_curve((1,), (0.01,))).to_dict() | {"loop": [1, 2]}
    with pytest.raises(ConfigError, match="loop of a round-time model must be objects"):
        RoundTimeModel.from_dict(document)
