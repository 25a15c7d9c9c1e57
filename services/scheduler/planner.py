"""Plans for one verifier: its newest report, and the pace of its rounds.

The capacity of the asynchronous scheduler (paper, section 5.2). A plan is computed from a round
that has ended and the verifier applies it to a later one, which keeps rejection sampling lossless.
"""

from __future__ import annotations

from dspark_core.algorithms.prefix_scheduler import unconstrained_capacity
from dspark_core.records import RoundReport, VerifyPlan
from services.scheduler.pace import VerifierPace


class VerifierPlanner:
    def __init__(self) -> None:
        self.pace = VerifierPace()
        self._latest: RoundReport | None = None

    def begin_stream(self) -> None:
        """A verifier that restarted counts its rounds from the beginning; its pace stays."""
        self._latest = None

    def observe(self, report: RoundReport) -> bool:
        """Learns from a report; False when it is no newer than what is known, and was ignored."""
        if self._latest is not None and report.round <= self._latest.round:
            return False
        self._latest = report
        self.pace.observe(report)
        return True

    def plan(self) -> VerifyPlan | None:
        """The capacity that would have maximised the newest round's throughput.

        None while there is nothing to plan from: no report, no timed step, or no drafts in the
        round. Zero would be wrong there, it would stop the drafts that could show otherwise.
        """
        report, model = self._latest, self.pace.model
        if report is None or model is None or not any(request.survival for request in report.requests):
            return None
        survival = [request.survival for request in report.requests]
        requests, drafted = len(survival), sum(map(bool, survival))
        most = sum(len(row) for row in survival)
        seconds = model.table(requests, most, report.context_tokens, drafted)
        return VerifyPlan(
            based_on_round=report.round,
            draft_token_capacity=unconstrained_capacity(
                survival, lambda batch_tokens: 1.0 / float(seconds[batch_tokens - requests])
            ),
        )
