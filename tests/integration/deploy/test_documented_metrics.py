"""The operators' table of metrics is the list of metrics there are."""

import re

from prometheus_client import CollectorRegistry

from services.common.rpc_metrics import MetricsLayer
from services.drafter.metrics import DrafterMetrics
from services.gateway.metrics import GatewayMetrics
from services.scheduler.metrics import SchedulerMetrics
from services.verifier.metrics import VerifierMetrics
from tests.integration.deploy.helm import ROOT


def exposed() -> set[str]:
    registry = CollectorRegistry()
    for metrics in (MetricsLayer, DrafterMetrics, SchedulerMetrics):
        metrics(registry)
    GatewayMetrics(registry).watch_queue(lambda: 0, lambda: 0)
    verifier = CollectorRegistry()
    VerifierMetrics(verifier).watch_status(_idle)
    families = [*registry.collect(), *verifier.collect()]
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def _idle():
    class Status:
        running_requests = waiting_requests = preemptions = 0
        free_kv_fraction = 1.0

    return Status()


def test_documented_metrics_are_those_exposed():
    text = (ROOT / "docs/operators.md").read_text()
    table = text.partition("## Metrics")[2].partition("Worth an alert")[0]
    documented = set(re.findall(r"`(dspark_[a-z_]+)(?:\{[a-z,]+\})?`", table))
    assert documented == exposed()
