"""The plain HTTP port: metrics, liveness, readiness."""

import contextlib
import logging
import os
import resource
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.registry import Collector

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
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=15) as response:
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
        with urllib.request.urlopen(f"http://[::1]:{server.port}/healthz", timeout=15) as response:
            assert response.status == 200
    finally:
        server.close()


class Asked(Collector):
    """Does something while it is scraped."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def collect(self) -> Iterator[Metric]:
        self._act()
        yield from ()


@contextlib.contextmanager
def serving(act: Callable[[], object]) -> Iterator[MetricsServer]:
    """Until its answers are over, too."""
    registry = CollectorRegistry(auto_describe=False)
    server = MetricsServer(registry=registry, ready=lambda: True, port=0, host="127.0.0.1")
    registry.register(Asked(act))
    before = set(threading.enumerate())
    yield server
    for thread in set(threading.enumerate()) - before:
        thread.join(15)
    server.close()


def test_a_scraper_that_hangs_up_is_no_error(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    asked, left = threading.Event(), threading.Event()
    with serving(lambda: (asked.set(), left.wait(15))) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no goodbye
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert asked.wait(15)
        left.set()
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_what_fails_otherwise_is_logged_and_not_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    with serving(lambda: 1 / 0) as server, pytest.raises(ConnectionError):
        _get(server, "/metrics")
    (record,) = caplog.records
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    assert "Traceback" not in capfd.readouterr().err


def test_a_scraper_for_whom_no_file_is_left_waits_without_load(server: MetricsServer):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(15)
        resource.setrlimit(resource.RLIMIT_NOFILE, (_next_file(), limits[1]))
        try:
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            began = time.process_time()
            assert not threading.Event().wait(0.5)
            spent = time.process_time() - began
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert client.recv(64).startswith(b"HTTP/1.0 200")
    assert spent < 0.25


def _next_file() -> int:
    """The number that the next file opened would get."""
    with open(os.devnull) as file:
        return file.fileno()
