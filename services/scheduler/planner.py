"""Plans for one verifier: its newest report, and the pace of its rounds.

The capacity of the asynchronous scheduler (paper, section 5.2). A plan is computed from a round
that has ended and the verifier applies it to a later one, which keeps rejection sampling lossless.
"""

from __future__ import annotations

from dataclasses import replace

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import capacity_of
from dspark_core.records import RoundReport, StepTime, VerifyPlan
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

    def missing_curve(self) -> tuple[StepTime, ...]:
        """Step times for a verifier that was not profiled; empty: it was, or nobody of its kind was. What
        its own rounds taught is not sent: it would take a round of any other shape to be as fast."""
        if self.pace.profiled or self.pace.model is None or not self.pace.measured:
            return ()
        return self.pace.model.verify.step_times()

    def plan(self) -> VerifyPlan | None:
        """The capacity that would have maximised the newest round's throughput.

        None while there is nothing to plan from: no report, no timed step, or no drafts in the
        round. Zero would be wrong there, it would stop the drafts that could show otherwise.
        """
        report, model = self._latest, self.pace.model
        if report is None or model is None or not any(request.survival for request in report.requests):
            return None
        context = report.context_tokens // len(report.requests)
        if report.cohorts > 1:  # the round before was another cohort's, while these were drafted for
            model = replace(model, beside_seconds=report.step_seconds)
        requests = [
            PlanRequest(
                sequence_id=request.sequence_id,
                survival=request.survival,
                floor_tokens_per_second=report.cohorts * request.min_tokens_per_second or None,
                context_tokens=context,
                origin=request.origin,
            )
            for request in report.requests
        ]
        return VerifyPlan(based_on_round=report.round, draft_token_capacity=capacity_of(requests, model))
