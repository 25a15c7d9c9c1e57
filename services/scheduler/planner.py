"""Plans for one verifier: its newest report, its step-rate curve, its time spent on drafts.

The capacity of the asynchronous scheduler (paper, section 5.2). A plan is computed from a round
that has ended and the verifier applies it to a later one, which keeps rejection sampling lossless.
"""

from __future__ import annotations

from dspark_core.algorithms.prefix_scheduler import unconstrained_capacity
from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.records import RoundReport, VerifyPlan
from services.scheduler.curves import refined

_DRAFT_SMOOTHING = 0.1


class VerifierPlanner:
    def __init__(self) -> None:
        self._profile: tuple[tuple[int, float], ...] = ()
        self._curve: StepRateCurve | None = None
        self._draft_seconds: float | None = None
        self._latest: RoundReport | None = None

    def begin_stream(self) -> None:
        """A verifier that restarted counts its rounds from the beginning; its curve stays."""
        self._latest = None

    def observe(self, report: RoundReport) -> bool:
        """Learns from a report; False when it is no newer than what is known, and was ignored."""
        if self._latest is not None and report.round <= self._latest.round:
            return False
        self._latest = report
        if report.profile and report.profile != self._profile:
            # A reconnect repeats the profile; what was learned on top of it is better.
            self._profile = report.profile
            tokens, seconds = zip(*report.profile, strict=True)
            self._curve = StepRateCurve(tokens, seconds)
        if report.batch_tokens > 0 and report.step_seconds > 0:
            self._curve = refined(self._curve, report.batch_tokens, report.step_seconds)
        known = self._draft_seconds
        self._draft_seconds = (
            report.draft_seconds
            if known is None
            else known + _DRAFT_SMOOTHING * (report.draft_seconds - known)
        )
        return True

    def plan(self) -> VerifyPlan | None:
        """The capacity that would have maximised the newest round's throughput.

        None while there is nothing to plan from: no report, no timed step, or no drafts in the
        round. Zero would be wrong there, it would stop the drafts that could show otherwise.
        """
        report, curve = self._latest, self._curve
        if report is None or curve is None or not any(request.survival for request in report.requests):
            return None
        rounds = curve.monotone().with_overhead(self._draft_seconds or 0.0)
        survival = [request.survival for request in report.requests]
        return VerifyPlan(
            based_on_round=report.round,
            draft_token_capacity=unconstrained_capacity(survival, rounds.steps_per_second),
        )
