"""The verifier's own plan source, simulated: it is told what a verifier would tell it."""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import PlanBatch
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.simulation.planners import RoundView, Served

THREE_TOKENS_ARE_FREE = RoundTimeModel(StepTimeModel.of_curve((1, 3, 4), (0.01, 0.01, 0.05)))


def test_of_equal_drafts_those_go_first_that_had_fewer_tokens_a_round() -> None:
    served = Served(THREE_TOKENS_ARE_FREE)
    none = np.zeros(2)
    served.drafted(RoundView(np.arange(2), np.full(2, 50), none, np.ones(2, dtype=np.bool_)))
    batch = PlanBatch(
        survival=np.full((2, 1), 0.8),
        floors=none,
        granted=np.array([0.9, 0.2]),
        coupled=np.ones(2, dtype=np.bool_),
        context_tokens=100,
    )
    assert served.plan(batch, np.zeros(0)).tolist() == [0, 1]
