"""Where `dspark up --host` listens, how that is written, and where its own calls find it."""

from __future__ import annotations

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from dspark_core.errors import ConfigError
from services.common.addresses import address_of
from services.embedded.options import StackOptions
from services.embedded.ports import require_free
from services.embedded.processes import ProcessStack, ServiceProcess


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("gpu1.example.org", "http://gpu1.example.org:8000"),
        ("::1", "http://[::1]:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # all of them: not to connect to
        ("::", "http://[::1]:8000"),
    ],
)
def test_a_host_is_written_as_urls_have_it(host: str, url: str) -> None:
    assert StackOptions(host=host).url == url


def test_an_address_that_is_not_here_is_told_as_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on \[2001:db8::1\]:8000: "):
        require_free("2001:db8::1", (8000,))


@pytest.mark.parametrize(
    ("listens", "host"),
    [("127.0.0.2", "127.0.0.2"), ("127.0.0.1", "0.0.0.0"), ("127.0.0.1", "127.0.0.1")],
)
async def test_a_service_is_asked_where_it_listens(listens: str, host: str) -> None:
    server = grpc.aio.server()
    answers = health.HealthServicer()
    await answers.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(answers, server)
    port = server.add_insecure_port(address_of(listens, 0))
    await server.start()
    process = ServiceProcess("gateway", {}, port, host=host, module="timeit")
    try:
        await process.wait_serving(10)
    finally:
        process.kill()
        await server.stop(None)


async def test_the_gateways_process_is_asked_at_the_host_of_the_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawned: dict[str, str] = {}

    class Process:
        def __init__(self, role: str, environ: object, port: int, *, host: str) -> None:
            spawned[role] = host

        async def wait_serving(self, seconds: float) -> None:
            pass

    monkeypatch.setattr("services.embedded.processes.ServiceProcess", Process)
    await ProcessStack(StackOptions(host="127.0.0.2", http_port=0, grpc_port=0)).start()
    others = ("scheduler", "drafter", "verifier")
    assert spawned == {"gateway": "127.0.0.2"} | dict.fromkeys(others, "127.0.0.1")
