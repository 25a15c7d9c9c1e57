"""Planners whose verify lengths ignore load: the baselines that scheduling is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.records import RoundReport


class FixedLengthPlanSource:
    """Always verifies the first `length` draft tokens of every request; 0: never drafts."""

    def __init__(self, length: int) -> None:
        self._length = length

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return given or 1

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return tuple(self._length > 0 and candidate.draftable for candidate in candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return tuple(min(self._length, len(request.survival)) for request in requests)

    def report(self, report: RoundReport) -> None:
        """Nothing to adapt."""


class ThresholdPlanSource:
    """Verifies draft tokens whose survival is at least `threshold`."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return given or 1

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return tuple(candidate.draftable for candidate in candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return tuple(sum(value >= self._threshold for value in request.survival) for request in requests)

    def report(self, report: RoundReport) -> None:
        """Nothing to adapt: only confidence matters."""
