"""Every metric the services expose, with its labels: one series of each is made and scraped."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from dspark_core.cluster.planning.calibration import CalibrationState, Traffic
from dspark_core.records import SpeculationStats
from services.common.interceptors import RpcCall
from services.common.rpc_metrics import MetricsLayer
from services.drafter.metrics import DrafterMetrics
from services.gateway.metrics import GatewayMetrics
from services.scheduler.metrics import SchedulerMetrics
from services.verifier.metrics import VerifierMetrics


def exposed_names() -> set[str]:
    """As an operator reads them: counters with their `_total`, histograms without a suffix."""
    families = [family for registry in _registries() for family in registry.collect()]
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def exposed_series() -> dict[str, set[str]]:
    """Names as they are scraped, with the labels they have."""
    series: dict[str, set[str]] = {}
    for registry in _registries():
        for family in registry.collect():
            for sample in family.samples:
                series.setdefault(sample.name, set()).update(sample.labels)
    return series


def _registries() -> tuple[CollectorRegistry, ...]:
    """Two: `dspark_` names without a service in them are the verifier's."""
    registry, verifier = CollectorRegistry(), CollectorRegistry()
    DrafterMetrics(registry)
    asyncio.run(_one_call(MetricsLayer(registry)))
    _fill_scheduler(SchedulerMetrics(registry))
    _fill_gateway(GatewayMetrics(registry))
    status = SimpleNamespace(running_requests=0, waiting_requests=0, preemptions=0, free_kv_fraction=1.0)
    metrics = VerifierMetrics(verifier)
    metrics.watch_status(lambda: status)
    metrics.watch_drafter(lambda: True)
    return registry, verifier


async def _one_call(layer: MetricsLayer) -> None:
    async with layer.around(RpcCall("/s/M", False, None)):
        pass


def _fill_scheduler(metrics: SchedulerMetrics) -> None:
    metrics.set_replicas(())
    metrics.set_weights({"m": 1})
    metrics.assigned("default", "assigned")
    metrics.set_waiting("default", 0)
    metrics.reports.labels("planned").inc()
    metrics.calibration.show(Traffic("m", "0"), CalibrationState(error=0.0, scaled_error=0.0))


def _fill_gateway(metrics: GatewayMetrics) -> None:
    metrics.watch_queue(lambda: 0, lambda: 0)
    metrics.http_request("/", 200)
    metrics.tiers.promise("default", held=True)
    metrics.prompt("default", 1, 0)
    metrics.tiers.completion("default", 1)
    metrics.tiers.quota_refused("default", "tokens_per_minute")
    metrics.first_token(1.0)
    metrics.generation_ended("stop", seconds=1.0, completion_tokens=1, stats=SpeculationStats(rounds=1))
