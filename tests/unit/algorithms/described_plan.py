"""Plans made by the array planners, with their expected outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.plan_batch import PlanBatch
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import plan_batch
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.speed_floor import expected_tokens, unmet_floors


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Verify lengths in the order of the requests, with their expected outcome."""

    lengths: tuple[int, ...]
    expected_tokens: float
    """Tokens committed by the round, including bonus tokens."""
    expected_seconds: float
    unmet_floors: tuple[int, ...]
    """Indices of requests whose floor this plan does not hold."""

    @property
    def throughput(self) -> float:
        """Expected tokens per second of the round."""
        return self.expected_tokens / self.expected_seconds

    @property
    def draft_tokens(self) -> int:
        return sum(self.lengths)


def plan(requests: Sequence[PlanRequest], round_time: RoundTimeModel, *, capacity: int | None = None) -> Plan:
    batch = PlanBatch.of(requests)
    lengths = plan_batch(batch, round_time, capacity=capacity)
    drafted = int(np.count_nonzero(batch.survival[:, :1] >= 0.0)) - batch.looked_up
    tokens = batch.requests + sum(lengths)
    seconds = round_time.seconds(batch.requests, tokens, batch.context_tokens, drafted)
    return Plan(
        lengths=lengths,
        expected_tokens=float(expected_tokens(batch, np.array(lengths)).sum()),
        expected_seconds=seconds,
        unmet_floors=unmet_floors(batch, np.array(lengths), seconds),
    )
