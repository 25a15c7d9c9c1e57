"""Plans for one verifier, from its newest report and the pace of its rounds.

Computes the capacity of the asynchronous scheduler (paper, section 5.2). A plan is computed from a completed
round and applied to a later one, which keeps rejection sampling lossless.
"""

from __future__ import annotations

from dataclasses import replace

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import capacity_of
from dspark_core.algorithms.survival_scaling import banded, scaled
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import RoundReport, ScalingBand, StepTime, VerifyPlan


class VerifierPlanner:
    def __init__(self, replica_id: str = "") -> None:
        self.pace = VerifierPace(replica_id)
        self._latest: RoundReport | None = None

    def begin_stream(self) -> None:
        """Accepts any round number next, as a restarted verifier counts anew; keeps the pace."""
        self._latest = None

    def observe(self, report: RoundReport) -> bool:
        """Learns from a report; returns False and ignores it if it is no newer than the last one."""
        if self._latest is not None and report.round <= self._latest.round:
            return False
        self._latest = report
        self.pace.observe(report)
        return True

    def missing_curve(self) -> tuple[StepTime, ...]:
        """Its kind's step times for a verifier without a profile; empty if it has one or its kind has none.
        A curve learned from its own rounds is not sent: it says nothing about rounds of other shapes."""
        if self.pace.profiled or self.pace.model is None or not self.pace.measured:
            return ()
        return self.pace.model.verify.step_times()

    def plan(self, scalings: tuple[ScalingBand, ...] = ()) -> VerifyPlan | None:
        """The draft token capacity that would have maximised the newest round's throughput.

        `scalings` go with the plan. They correct the reported survival, which is the drafter's own: without
        them, confidences that promise too much would get too many of their tokens verified.

        None while there is nothing to plan from: no report, no timed step, or no drafts in the round. A
        capacity of zero would be wrong then: it would prevent the drafts that could prove it wrong.
        """
        report, model = self._latest, self.pace.model
        if report is None or model is None or not any(request.survival for request in report.requests):
            return None
        context = report.context_tokens // len(report.requests)
        if report.cohorts > 1:  # these were drafted for while the target computed another cohort
            model = replace(model, beside_seconds=report.step_seconds)
        requests = [
            PlanRequest(
                sequence_id=request.sequence_id,
                survival=request.survival,
                floor_tokens_per_second=report.cohorts * request.min_tokens_per_second or None,
                context_tokens=context,
                origin=request.origin,
                temperature=request.temperature,
            )
            for request in report.requests
        ]
        return VerifyPlan(
            based_on_round=report.round,
            draft_token_capacity=capacity_of(scaled(requests, banded(scalings)), model),
            scalings=scalings,
        )
