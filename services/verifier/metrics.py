"""Prometheus metrics of the round loop, derived from round reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.engine.protocols import PlanSource
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.engine.rounds.verifier import VerifierStatus
from dspark_core.records import DraftOrigin, RoundReport

_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
# Fine below the default deadline of 0.5 s: the alert must tell waits that reached it from shorter ones.
_DRAFT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 1.0)


class VerifierMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._step = Histogram(
            "dspark_step_seconds",
            "Target pass and acceptance of one round.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._draft = Histogram(
            "dspark_draft_wait_seconds",
            "Wait for drafts in one round.",
            buckets=_DRAFT_BUCKETS,
            registry=registry,
        )
        self._hidden = Counter(
            "dspark_hidden_draft_seconds",
            "Drafting and the network while the target computed another cohort.",
            registry=registry,
        )
        self._cohorts = Gauge(
            "dspark_cohorts",
            "Cohorts of requests that take turns; 1: rounds are of everybody.",
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "dspark_batch_tokens",
            "Tokens in one target pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=registry,
        )
        self._verified = Counter(
            "dspark_verified_tokens", "Draft tokens put through the target.", registry=registry
        )
        self._accepted = Counter("dspark_accepted_tokens", "Draft tokens accepted.", registry=registry)
        self._looked_up = Counter(
            "dspark_lookup_verified_tokens", "Of the verified tokens, those looked up.", registry=registry
        )
        self._lookup_accepted = Counter(
            "dspark_lookup_accepted_tokens", "Of the accepted tokens, those looked up.", registry=registry
        )
        self._rounds = Counter(
            "dspark_request_rounds", "Rounds times requests: accepted / this + 1 is tau.", registry=registry
        )
        self._undrafted = Counter(
            "dspark_undrafted_request_rounds", "Of those, rounds without a draft.", registry=registry
        )
        self._plans = _plans(registry)
        self._profiled = Gauge(
            "dspark_step_time_profiled",
            "1: step times are known; 0: not profiled, verification is held back.",
            registry=registry,
        )
        self._paused = Gauge(
            "dspark_undrafted_requests", "Requests not drafted for now: it would not pay.", registry=registry
        )
        self._trace_dropped: Callable[[], int] = lambda: 0
        lost = "dspark_trace_dropped_records", "Round-trace records lost."
        registry.register(_ReadCounter(*lost, lambda: self._trace_dropped()))

    def observe_round(self, report: RoundReport) -> None:
        self._step.observe(report.step_seconds)
        if report.draft_seconds:
            self._draft.observe(report.draft_wait_seconds)
        self._hidden.inc(report.hidden_draft_seconds)
        self._cohorts.set(report.cohorts)
        self._batch_tokens.observe(report.batch_tokens)
        self._verified.inc(sum(request.verify_length for request in report.requests))
        self._accepted.inc(sum(request.accepted for request in report.requests))
        looked_up = [request for request in report.requests if request.origin is DraftOrigin.LOOKUP]
        self._looked_up.inc(sum(request.verify_length for request in looked_up))
        self._lookup_accepted.inc(sum(request.accepted for request in looked_up))
        self._rounds.inc(len(report.requests))
        self._undrafted.inc(sum(not request.survival for request in report.requests))

    def observe_plan(self, source: str) -> None:
        self._plans.labels(source).inc()

    def watch_status(self, status: Callable[[], VerifierStatus]) -> None:
        """Reads queue and cache levels whenever metrics are scraped."""
        gauges: dict[str, tuple[str, Callable[[VerifierStatus], float]]] = {
            "dspark_running_requests": ("Requests sharing target passes.", lambda s: s.running_requests),
            "dspark_waiting_requests": ("Requests queued.", lambda s: s.waiting_requests),
            "dspark_free_kv_fraction": ("KV pages free or reclaimable.", lambda s: s.free_kv_fraction),
        }
        for name, (text, read) in gauges.items():
            gauge = Gauge(name, text, registry=self._registry)
            gauge.set_function(lambda read=read: read(status()))  # type: ignore[misc]
        preempted = _ReadCounter(
            "dspark_preemptions", "Requests that gave their pages up.", lambda: status().preemptions
        )
        self._registry.register(preempted)

    def watch_drafter(self, connected: Callable[[], bool]) -> None:
        """For a verifier that is to have one: without it the gauge does not exist, and no alert fires."""
        gauge = Gauge(
            "dspark_drafter_connected",
            "1: drafts can be had; 0: the drafter is lost, or serves another checkpoint.",
            registry=self._registry,
        )
        gauge.set_function(connected)

    def watch_planner(self, planner: LocalPlanSource) -> None:
        """Exports whether it knows the engine's speed and how many requests it does not draft for."""
        self._profiled.set_function(lambda: float(planner.round_time is not None))
        self._paused.set_function(lambda: planner.paused_requests)

    def watch_trace(self, dropped: Callable[[], int]) -> None:
        self._trace_dropped = dropped


class _ReadCounter(Collector):
    """A counter whose value is kept elsewhere and read at every scrape."""

    def __init__(self, name: str, text: str, read: Callable[[], int]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


def _plans(registry: CollectorRegistry) -> Counter:
    plans = Counter("dspark_plans", "Rounds planned, by whose capacity.", ["source"], registry=registry)
    for source in ("scheduler", "local"):
        plans.labels(source)  # shown from the start
    return plans


class ObservedPlanSource:
    """A `PlanSource` whose plans and reports are also counted."""

    def __init__(self, inner: PlanSource, metrics: VerifierMetrics, planner_name: Callable[[], str]) -> None:
        """`planner_name` names the planner that made the latest plan."""
        self._inner = inner
        self._metrics = metrics
        self._planner_name = planner_name

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return self._inner.cohorts(candidates, given)

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return self._inner.wants_draft(candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        planned = self._inner.plan(requests, capacity)
        self._metrics.observe_plan(self._planner_name())
        return planned

    def report(self, report: RoundReport) -> None:
        self._metrics.observe_round(report)
        self._inner.report(report)


def profile_problem(planner: LocalPlanSource) -> str | None:
    """What is wrong with the verifier's step times, or None; agrees with the metric."""
    if planner.round_time is None:
        return "not profiled: only the first, likely draft tokens are verified"
    return None
