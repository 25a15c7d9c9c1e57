"""Local planning: Algorithm 1 over the step-rate curve this engine measured."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.prefix_scheduler import PrefixScheduler
from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.records import RoundReport

SMOOTHING = 0.1
"""Weight of the newest round in the running means of draft time and of the machine's speed."""
MAX_SURPRISE = 2.0
"""How far one round may be from the expected duration: a stall says little about the next round."""


class LocalPlanSource:
    """`PlanSource` with no one to ask: lossless in rejection mode because it stops early."""

    def __init__(self, curve: StepRateCurve) -> None:
        self._curve = curve
        self._draft_seconds: float | None = None
        self._slowdown = 1.0
        self._scheduler = PrefixScheduler(self._rounds_per_second)

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return self._scheduler.plan(survival).lengths

    def report(self, report: RoundReport) -> None:
        """Learns what drafting costs and how busy the machine is; earlier rounds bias nothing.

        The curve keeps its measured shape and is scaled as a whole: refining only the points that
        plans visit would make the others look dear for ever.
        """
        if report.batch_tokens > 0 and report.step_seconds > 0:
            expected = self._slowdown * self._curve.seconds(report.batch_tokens)
            surprise = min(max(report.step_seconds / expected, 1.0 / MAX_SURPRISE), MAX_SURPRISE)
            self._slowdown *= surprise**SMOOTHING
        if report.draft_seconds > 0:
            known = report.draft_seconds if self._draft_seconds is None else self._draft_seconds
            self._draft_seconds = known + SMOOTHING * (report.draft_seconds - known)

    def _rounds_per_second(self, batch_tokens: int) -> float:
        step_seconds = self._slowdown * self._curve.seconds(batch_tokens)
        return 1.0 / (step_seconds + (self._draft_seconds or 0.0))


class FullPlanSource:
    """Verifies every draft token: static speculation, the baseline scheduling is measured against."""

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return tuple(len(row) for row in survival)

    def report(self, report: RoundReport) -> None:
        """A static plan learns nothing."""
