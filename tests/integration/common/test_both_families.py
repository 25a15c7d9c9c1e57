"""Servers that listen on all addresses answer over IPv4 and IPv6 alike: a pod may have only one of them."""

import asyncio
import socket

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from services.common.addresses import bound_socket
from services.common.metrics_http import MetricsServer
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.gateway.admission import Admission
from services.gateway.config import GatewayConfig
from services.gateway.http.server import HttpServer

pytestmark = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this machine")
BOTH = pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
HOSTS = pytest.mark.parametrize("host", [GatewayConfig().http_host, "::"])


def answers(address: str, port: int) -> bool:
    with socket.create_connection((address, port), timeout=15) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return connection.makefile("rb").readline().split()[1] == b"200"


@BOTH
@HOSTS
def test_metrics_are_served_over_both(address, host):
    server = MetricsServer(registry=CollectorRegistry(), ready=lambda: True, port=0, host=host)
    try:
        assert answers(address, server.port)
    finally:
        server.close()


@BOTH
@HOSTS
async def test_the_rest_api_is_served_over_both(address, host):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    server = HttpServer(app, Admission(1, 1), host=host, port=0, keep_alive_seconds=5)
    await server.start()
    try:
        assert await asyncio.to_thread(answers, address, server.port)
    finally:
        await server.stop()


@BOTH
@HOSTS
async def test_grpc_is_served_over_both(address, host):
    server = GrpcServer(ServerOptions(port=0, host=host), [], Telemetry(service="both"))
    port = await server.start()
    target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    async with grpc.aio.insecure_channel(target) as channel:
        await asyncio.wait_for(channel.channel_ready(), 15)
    await server.stop()


def test_a_machine_without_ipv6_listens_on_ipv4(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bound_socket("0.0.0.0", 0) as listener:
        assert listener.family is socket.AF_INET


@BOTH
def test_a_port_that_one_family_has_taken_is_taken(address):
    with bound_socket(address, 0) as taken:
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            bound_socket("0.0.0.0", taken.getsockname()[1])
