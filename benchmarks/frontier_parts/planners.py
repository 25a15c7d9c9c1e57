"""Verify lengths that do not look at load: the baselines scheduling is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.records import RoundReport


class FixedLengthPlanSource:
    """The first `length` draft tokens of everyone, always."""

    def __init__(self, length: int) -> None:
        self._length = length

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return tuple(min(self._length, len(row)) for row in survival)

    def report(self, report: RoundReport) -> None:
        """Fixed is fixed."""


class ThresholdPlanSource:
    """Draft tokens whose survival is at least `threshold`."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return tuple(sum(value >= self._threshold for value in row) for row in survival)

    def report(self, report: RoundReport) -> None:
        """Confidence is all it looks at."""
