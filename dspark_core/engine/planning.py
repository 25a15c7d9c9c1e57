"""Local planning: Algorithm 1 over the step-rate curve this engine measured."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.prefix_scheduler import PrefixScheduler
from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.records import RoundReport


class LocalPlanSource:
    """`PlanSource` with no one to ask: lossless in rejection mode because it stops early."""

    def __init__(self, curve: StepRateCurve) -> None:
        self._scheduler = PrefixScheduler(curve.steps_per_second)

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return tuple(self._scheduler.plan(survival).lengths)

    def report(self, report: RoundReport) -> None:
        """Nothing to learn yet: the curve was measured at start."""


class FullPlanSource:
    """Verifies every draft token: static speculation, the baseline the scheduler is measured against."""

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return tuple(len(row) for row in survival)

    def report(self, report: RoundReport) -> None:
        """A static plan learns nothing."""
