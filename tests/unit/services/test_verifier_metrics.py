"""What others count is exposed with the type that Prometheus' rates ask for."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from services.verifier.metrics import VerifierMetrics


def test_counts_that_others_keep_are_counters_read_when_scraped() -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    status = SimpleNamespace(running_requests=1, waiting_requests=2, preemptions=3, free_kv_fraction=0.5)
    dropped = [0]
    metrics.watch_status(lambda: status)
    assert registry.get_sample_value("dspark_trace_dropped_records_total") == 0  # also without a trace
    metrics.watch_trace(lambda: dropped[0])
    status.preemptions, dropped[0] = 4, 5
    assert registry.get_sample_value("dspark_preemptions_total") == 4
    assert registry.get_sample_value("dspark_trace_dropped_records_total") == 5
    types = {family.name: family.type for family in registry.collect()}
    assert types["dspark_preemptions"] == types["dspark_trace_dropped_records"] == "counter"


def test_only_a_verifier_that_is_to_have_a_drafter_tells_of_one() -> None:
    """Or the alert would fire for one that drafts from looked-up text alone."""
    registry, connected = CollectorRegistry(), [False]
    metrics = VerifierMetrics(registry)
    assert registry.get_sample_value("dspark_drafter_connected") is None
    metrics.watch_drafter(lambda: connected[0])
    assert registry.get_sample_value("dspark_drafter_connected") == 0
    connected[0] = True
    assert registry.get_sample_value("dspark_drafter_connected") == 1
