"""Verify lengths that do not look at load: the baselines scheduling is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.engine.planning import FullPlanSource


class FixedLengthPlanSource(FullPlanSource):
    """The first `length` draft tokens of everyone, always."""

    def __init__(self, length: int) -> None:
        self._length = length

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return tuple(min(self._length, len(request.survival)) for request in requests)


class ThresholdPlanSource(FullPlanSource):
    """Draft tokens whose survival is at least `threshold`."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return tuple(sum(value >= self._threshold for value in request.survival) for request in requests)
