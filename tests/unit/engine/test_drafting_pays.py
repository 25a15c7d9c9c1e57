"""Speculation that does not pay costs almost nothing: times of answers with and without it.

Simulates a machine (15 ms steps, 8 ms drafts, as with this project's demo model on one core) and drafts that
survive with the predicted probability, at every level of predictability.
"""

from __future__ import annotations

import random
from itertools import accumulate
from operator import mul

import pytest

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.records import RequestSurvival, RoundReport

TIMES = RoundTimeModel(
    StepTimeModel.of_curve((1, 2, 4, 8), (0.0152, 0.0152, 0.0180, 0.0309)),
    DraftTimeModel((1,), (0.0079,)),
)
TOKENS = 128
ANSWERS = 30


def speed(confidence: float, noise: float, seed: int) -> float:
    """Tokens per second over consecutive answers if each draft token is accepted with probability of about
    `confidence`; step times jitter by `noise`."""
    source, planner = random.Random(seed), LocalPlanSource(TIMES)
    seconds, tokens = 0.0, 0
    for answer in range(ANSWERS):
        done = 0
        while done < TOKENS:
            name = f"a{answer}"
            (wants,) = planner.wants_draft([DraftCandidate(sequence_id=name)])
            chances = [min(1.0, max(0.0, source.gauss(confidence, 0.15))) for _ in range(7 if wants else 0)]
            survival = tuple(accumulate(chances, mul))
            (length,) = planner.plan([PlanRequest(sequence_id=name, survival=survival)])
            accepted = 0
            while accepted < length and source.random() < chances[accepted]:
                accepted += 1
            jitter = source.lognormvariate(0.0, noise)
            step, draft = jitter * TIMES.verify.seconds(1, 1 + length), TIMES.overhead_seconds(int(wants))
            told = RequestSurvival(
                sequence_id=name, survival=survival, verify_length=length, accepted=accepted
            )
            planner.report(
                RoundReport(
                    replica_id="v",
                    round=1,
                    requests=(told,),
                    batch_tokens=1 + length,
                    step_seconds=step,
                    draft_seconds=draft,
                )
            )
            seconds, done = seconds + step + draft, done + 1 + accepted
        tokens += done
    return tokens / seconds


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("confidence", [0.05, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5])
def test_unpredictable_text_is_at_most_three_per_cent_slower(confidence: float, noise: float) -> None:
    assert speed(confidence, noise, seed=1) > 0.97 / TIMES.seconds(1, 1)


@pytest.mark.parametrize(("confidence", "gain"), [(0.7, 1.05), (0.8, 1.3), (0.9, 1.6)])
def test_predictable_text_keeps_its_gain(confidence: float, gain: float) -> None:
    assert speed(confidence, 0.1, seed=2) > gain / TIMES.seconds(1, 1)
