"""Records what every round proposed and what came of it, for calibration and acceptance statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.engine.protocols import PlanSource
from dspark_core.records import RequestSurvival, RoundReport


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round of one request."""

    sequence_id: str
    confidences: tuple[float, ...]
    """Of every draft position that may be verified; the block's end is cut near the length limit."""
    verify_length: int
    """Draft tokens that went through the target."""
    accepted: int
    """Leading ones that it accepted, tokens after a stop token included."""


@dataclass(frozen=True, slots=True)
class RecordedRounds:
    """Rounds in the order they happened, also those in which nothing was verified."""

    rounds: tuple[RoundRecord, ...]

    def of(self, sequence_ids: Sequence[str]) -> RecordedRounds:
        """The rounds of some of the requests."""
        wanted = frozenset(sequence_ids)
        return RecordedRounds(tuple(record for record in self.rounds if record.sequence_id in wanted))


class RecordingPlanSource:
    """A `PlanSource` that plans as another does and keeps what the reports say."""

    def __init__(self, inner: PlanSource) -> None:
        self._inner = inner
        self._rounds: list[RoundRecord] = []

    @property
    def recorded(self) -> RecordedRounds:
        return RecordedRounds(tuple(self._rounds))

    def plan(self, survival: Sequence[Sequence[float]]) -> tuple[int, ...]:
        return self._inner.plan(survival)

    def report(self, report: RoundReport) -> None:
        self._rounds.extend(_record(request) for request in report.requests)
        self._inner.report(report)


def _record(request: RequestSurvival) -> RoundRecord:
    return RoundRecord(
        sequence_id=request.sequence_id,
        confidences=confidence_from_survival(request.survival),
        verify_length=request.verify_length,
        accepted=request.accepted,
    )


def confidence_from_survival(survival: Sequence[float]) -> tuple[float, ...]:
    """c_k = a_k / a_{k-1}, 0 where nothing survives: the inverse of `survival_from_confidence`."""
    before = (1.0, *survival)
    return tuple(now / then if then > 0.0 else 0.0 for now, then in zip(survival, before, strict=False))
