"""The scheduler's Prometheus metrics."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dspark_core.cluster.planning.calibration import CalibrationState, Traffic
from dspark_core.records import Replica, Role

_LAG_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class CalibrationMetrics:
    """How well each model's confidences fit the outcomes, by band of sampling temperatures."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._error = Gauge(
            "dspark_scheduler_calibration_error",
            "Mean calibration error of survival, as drafters tell it and as rescaled online",
            ["model", "temperature", "confidences"],
            registry=registry,
        )
        self._rescaling = Gauge(
            "dspark_scheduler_rescaling",
            "1 while verifiers are sent an online calibration",
            ["model", "temperature"],
            registry=registry,
        )
        self._drift = Gauge(
            "dspark_scheduler_calibration_drift",
            "1 while drafters' confidences do not fit the traffic any more",
            ["model", "temperature"],
            registry=registry,
        )

    def show(self, traffic: Traffic, state: CalibrationState) -> None:
        self._error.labels(*traffic, "drafter").set(state.error)
        self._error.labels(*traffic, "rescaled").set(state.scaled_error)
        self._rescaling.labels(*traffic).set(state.scaling is not None)
        self._drift.labels(*traffic).set(state.drifted)

    def clear(self) -> None:
        for gauge in (self._error, self._rescaling, self._drift):
            gauge.clear()


class SchedulerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.calibration = CalibrationMetrics(registry)
        self._replicas = Gauge(
            "dspark_scheduler_replicas", "Replicas with a running lease", ["role"], registry=registry
        )
        self._weights = Gauge(
            "dspark_scheduler_weights",
            "Different weights that a model's verifiers serve; more than 1 during a rollout only",
            ["model"],
            registry=registry,
        )
        self._weighed: set[str] = set()
        self._registry_up = Gauge(
            "dspark_scheduler_registry_up", "1 while the shared registry answers", registry=registry
        )
        self._assigns = Counter(
            "dspark_scheduler_assigns",
            "Requests to assign a verifier: assigned, refused (floors), unavailable, invalid",
            ["tier", "result"],
            registry=registry,
        )
        self._waiting = Gauge(
            "dspark_scheduler_waiting_requests",
            "Requests that wait until speed floors allow them",
            ["tier"],
            registry=registry,
        )
        self._leading = Gauge(
            "dspark_scheduler_leading", "1 while this scheduler leads, 0 on a standby", registry=registry
        )
        self._floor_concurrency = Gauge(
            "dspark_scheduler_floor_concurrency",
            "Most requests at which all speed floors hold, summed over the verifiers that promised some",
            registry=registry,
        )
        self._draft_price = Gauge(
            "dspark_scheduler_draft_price",
            "Tokens that a second of a drafter's time is worth where demand meets it; 0: enough for all",
            ["drafter"],
            registry=registry,
        )
        self.reports = Counter(
            "dspark_scheduler_reports",
            "Round reports: planned, stale (an older round), superseded (a newer one came before its "
            "plan), unplannable (nothing to plan from), heard (its verifier plans for itself)",
            ["result"],
            registry=registry,
        )
        self.capacity = Histogram(
            "dspark_scheduler_plan_draft_tokens",
            "Draft token capacity of the plans sent",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=registry,
        )
        self.report_lag = Histogram(
            "dspark_scheduler_report_lag_seconds",
            "From the arrival of a report to its plan",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )

    def set_replicas(self, replicas: Iterable[Replica]) -> None:
        count = Count(replica.role for replica in replicas)
        for role in Role:
            self._replicas.labels(role.value).set(count[role])

    def set_weights(self, served: Mapping[str, int]) -> None:
        """`served`: number of different weights by model; others' series are removed."""
        for model in self._weighed - served.keys():
            self._weights.remove(model)
        self._weighed = set(served)
        for model, count in served.items():
            self._weights.labels(model).set(count)

    def set_leading(self, leading: bool) -> None:
        """Also drops what was published as the leader when leading ends: it would go stale."""
        self._leading.set(leading)
        if not leading:
            self.calibration.clear()
            self._draft_price.clear()
            self._floor_concurrency.set(0)

    def assigned(self, tier: str, result: str) -> None:
        self._assigns.labels(tier, result).inc()

    def set_waiting(self, tier: str, waiting: int) -> None:
        self._waiting.labels(tier).set(waiting)

    def forget_tier(self, tier: str) -> None:
        self._waiting.remove(tier)

    def set_floor_concurrency(self, requests: int) -> None:
        self._floor_concurrency.set(requests)

    def set_draft_price(self, drafter: str, price: float | None) -> None:
        """None removes the drafter's series: drafters are named by their addresses, which come and go."""
        if price is None:
            self._draft_price.remove(drafter)
        else:
            self._draft_price.labels(drafter).set(price)

    def set_registry_up(self, up: bool) -> None:
        self._registry_up.set(up)
