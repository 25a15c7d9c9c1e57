"""A `PlanSource` that also writes a sample of its rounds to a trace."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.engine.protocols import PlanSource
from dspark_core.engine.tracing.trace_format import TracedCurve, TracedRequest, TracedRound
from dspark_core.engine.tracing.trace_writer import TraceWriter
from dspark_core.records import DraftOrigin, RoundReport


class TracingPlanSource:
    """Delegates every decision to the inner source. Samples rounds at even intervals, whatever they hold."""

    def __init__(
        self,
        inner: PlanSource,
        writer: TraceWriter,
        *,
        sample: float,
        planner_name: Callable[[], str],
        curve: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`planner_name` names the planner of the latest plan; `curve` is the step-time document."""
        self._inner = inner
        self._writer = writer
        self._sample = sample
        self._planner_name = planner_name
        self._clock = clock
        self._due = 0.0
        self._planned: tuple[int, ...] = ()
        self._requests: tuple[PlanRequest, ...] = ()
        self._name = ""
        self._curve_version = ""
        if curve is not None:
            self._curve_version = curve_version(curve)
            writer.put(TracedCurve(version=self._curve_version, document=curve))

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return self._inner.cohorts(candidates, given)

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return self._inner.wants_draft(candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        self._planned = self._inner.plan(requests, capacity)
        self._requests = tuple(requests)
        self._name = self._planner_name()
        return self._planned

    def report(self, report: RoundReport) -> None:
        self._inner.report(report)
        self._due += self._sample
        if self._due >= 1.0 - 1e-9:
            self._due -= 1.0
            self._writer.put(self._record(report))

    def _record(self, report: RoundReport) -> TracedRound:
        # A prefill-only round was not planned: the stored plan belongs to an earlier round.
        planned = zip(self._requests, self._planned, strict=True) if report.requests else ()
        return TracedRound(
            at=self._clock(),
            round=report.round,
            planner=self._name if report.requests else "",
            curve_version=self._curve_version,
            batch_tokens=report.batch_tokens,
            step_seconds=report.step_seconds,
            draft_seconds=report.draft_wait_seconds,
            loop_seconds=report.loop_seconds,
            context_tokens=report.context_tokens,
            requests=tuple(
                TracedRequest(
                    sequence_id=request.sequence_id,
                    survival=request.survival,
                    planned=length,
                    verified=request.verify_length,
                    accepted=request.accepted,
                    min_tokens_per_second=request.min_tokens_per_second,
                    coupled=plan_request.coupled,
                    looked_up=request.origin is DraftOrigin.LOOKUP,
                )
                for request, (plan_request, length) in zip(report.requests, planned, strict=False)
            ),
        )


def curve_version(document: Mapping[str, object]) -> str:
    """Equal documents have equal versions on every replica."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
