"""The plain HTTP port: metrics, liveness, readiness."""

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from dspark_core.errors import ConfigError
from services.common.metrics_http import MetricsServer


@pytest.fixture
def ready() -> list[bool]:
    return [False]


@pytest.fixture
def server(ready: list[bool]) -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Counter("dspark_things", "things", registry=registry).inc(3)
    server = MetricsServer(registry=registry, ready=lambda: ready[0], port=0, host="127.0.0.1")
    yield server
    server.close()


def _get(server: MetricsServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_come_from_the_given_registry_alone(server: MetricsServer):
    status, body = _get(server, "/metrics")
    assert status == 200
    assert "dspark_things_total 3.0" in body
    assert "python_info" not in body


def test_health_and_readiness_differ(server: MetricsServer, ready: list[bool]):
    assert _get(server, "/healthz")[0] == 200
    assert _get(server, "/readyz")[0] == 503
    ready[0] = True
    assert _get(server, "/readyz")[0] == 200


def test_other_paths_are_not_found(server: MetricsServer):
    assert _get(server, "/admin")[0] == 404


def test_a_taken_port_is_a_config_error(server: MetricsServer):
    with pytest.raises(ConfigError, match=str(server.port)):
        MetricsServer(registry=CollectorRegistry(), ready=lambda: True, port=server.port, host="127.0.0.1")


def test_closing_frees_the_port():
    first = MetricsServer(registry=CollectorRegistry(), ready=lambda: True, port=0, host="127.0.0.1")
    first.close()
    MetricsServer(registry=CollectorRegistry(), ready=lambda: True, port=first.port, host="127.0.0.1").close()


def test_readiness_tells_what_is_not_as_it_should_be():
    details = ["profile: not profiled"]
    server = MetricsServer(
        registry=CollectorRegistry(), ready=lambda: True, port=0, host="127.0.0.1", details=lambda: details
    )
    assert _get(server, "/readyz") == (200, "ready\nprofile: not profiled\n")
    details.clear()
    assert _get(server, "/readyz") == (200, "ready\n")
    server.close()


def test_it_listens_on_an_address_of_ipv6(ready: list[bool]):
    server = MetricsServer(registry=CollectorRegistry(), ready=lambda: ready[0], port=0, host="::1")
    try:
        with urllib.request.urlopen(f"http://[::1]:{server.port}/healthz", timeout=5) as response:
            assert response.status == 200
    finally:
        server.close()
