"""Observes every round of a round loop without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from dspark_core.algorithms.draft_policy import DraftCandidate, DraftPolicy
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.protocols import DraftGeometry, DraftItem, DraftReply, DraftSource
from dspark_core.engine.rounds.loop import RoundOutput
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.evaluation.round_table import DraftRound
from dspark_core.records import FinishReason, RequestSurvival, RoundReport


class RecordingPlan(FullPlanSource):
    """Verifies whole blocks and keeps the report of the latest round."""

    def __init__(self) -> None:
        self._report: RoundReport | None = None

    def report(self, report: RoundReport) -> None:
        self._report = report

    def take_report(self) -> RoundReport | None:
        """Report of the round since the last call; None if there was none."""
        report, self._report = self._report, None
        return report


_FREE = RoundTimeModel(StepTimeModel.of_curve((1,), (1.0,)))
"""Round times under which drafting and verifying cost nothing: every round takes equally long."""


class ServedPlan(RecordingPlan):
    """Asks the drafter where it is expected to yield more accepted tokens than lookup, as the served policy
    does when neither drafting nor verifying takes time."""

    def __init__(self) -> None:
        super().__init__()
        self._policy = DraftPolicy()

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return self._policy.choose(candidates, _FREE)

    def report(self, report: RoundReport) -> None:
        self._policy.learn(report.requests)
        super().report(report)


class RecordingDrafts:
    """A `DraftSource` that remembers which blocks of the latest round came with confidences.

    Reports do not show this, because the round loop assumes a confidence for drafts without one. Releasing a
    sequence does not forget it: a round releases sequences that end before the caller can ask about them.
    """

    def __init__(self, source: DraftSource) -> None:
        self._source = source
        self._confident: frozenset[str] = frozenset()

    @property
    def geometry(self) -> DraftGeometry:
        return self._source.geometry

    @property
    def apart(self) -> bool:
        """False: drafting never starts ahead of its round, so what is remembered belongs to the latest."""
        return False

    @property
    def connected(self) -> bool:
        return self._source.connected

    @property
    def generation(self) -> int:
        return self._source.generation

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        self._confident = frozenset()
        future = self._source.propose(items)
        future.add_done_callback(self._remember)
        return future

    def release(self, sequence_ids: Sequence[str]) -> None:
        self._source.release(sequence_ids)

    def is_confident(self, sequence_id: str) -> bool:
        return sequence_id in self._confident

    def _remember(self, future: Future[DraftReply]) -> None:
        if future.exception() is None:
            blocks = future.result().blocks
            self._confident = frozenset(block.sequence_id for block in blocks if block.confidences)


def draft_round(request: RequestSurvival, output: RoundOutput, *, confident: bool) -> DraftRound:
    """One request's round, from the loop's report and output."""
    committed = len(output.chunk.token_ids)
    stopped = output.chunk.finish_reason is FinishReason.STOP and committed <= request.accepted
    return DraftRound(
        drafted=len(request.survival),
        verified=request.verify_length,
        accepted=min(request.accepted, committed),
        committed=committed,
        stopped=stopped,
        survival=request.survival if confident else (),
    )
