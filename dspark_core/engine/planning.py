"""Local planning: Algorithm 1 over the step-rate curve this engine measured."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.prefix_scheduler import PrefixScheduler
from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.records import RoundReport

DRAFT_SMOOTHING = 0.1
"""Weight of the newest round in the running mean of draft time."""


class LocalPlanSource:
    """`PlanSource` with no one to ask: lossless in rejection mode because it stops early."""

    def __init__(self, curve: StepRateCurve) -> None:
        self._curve = curve
        self._draft_seconds: float | None = None
        self._scheduler = PrefixScheduler(self._rounds_per_second)

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return self._scheduler.plan(survival).lengths

    def report(self, report: RoundReport) -> None:
        """Learns what drafting costs here; the waits of earlier rounds bias nothing."""
        if report.draft_seconds <= 0:
            return
        if self._draft_seconds is None:
            self._draft_seconds = report.draft_seconds
        self._draft_seconds += DRAFT_SMOOTHING * (report.draft_seconds - self._draft_seconds)

    def _rounds_per_second(self, batch_tokens: int) -> float:
        return 1.0 / (self._curve.seconds(batch_tokens) + (self._draft_seconds or 0.0))


class FullPlanSource:
    """Verifies every draft token: static speculation, the baseline scheduling is measured against."""

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return tuple(len(row) for row in survival)

    def report(self, report: RoundReport) -> None:
        """A static plan learns nothing."""
