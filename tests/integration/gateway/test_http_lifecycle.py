"""Disconnects, queue limits, probes, metrics, the page, draining and spans, over real HTTP."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspark_core.errors import ConfigError
from services.common.telemetry import Telemetry
from services.gateway.config import GatewayLimits
from services.gateway.http import body as http_body
from services.gateway.http.server import HttpServer
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.support.fake_generation import FakeBackend
from tests.support.polling import eventually

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def open_request(running: RunningGateway, *, stream: bool) -> AsyncIterator[asyncio.StreamReader]:
    """A raw connection, closed abruptly at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.http.port)
    body = json.dumps({**CHAT, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(("stream", "hold_after"), [(False, 0), (False, 1), (True, 0), (True, 1)])
async def test_a_client_that_leaves_cancels_its_request_at_once(serve: Serve, stream, hold_after) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = hold_after
    running = await serve(backend)
    async with open_request(running, stream=stream) as reader:
        if stream and hold_after:
            await asyncio.wait_for(reader.readuntil(b"abc"), 15)
        await eventually(lambda: backend.running == 1)
    await eventually(lambda: backend.running == 0)
    assert backend.cancelled == 1
    await eventually(lambda: running.gateway.admission.running == 0)
    code = 200 if stream and hold_after else 499
    counted = f'dspark_gateway_http_requests_total{{code="{code}",route="/v1/chat/completions"}}'
    assert await running.metric(counted) == f"{counted} 1.0"


async def test_a_body_that_does_not_come_is_the_clients_fault(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(http_body, "BODY_TIMEOUT_SECONDS", 0.05)
    running = await serve(FakeBackend())

    reader, writer = await asyncio.open_connection("127.0.0.1", running.http.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
    status = await asyncio.wait_for(reader.readline(), 15)
    rest = await asyncio.wait_for(reader.readuntil(b"}}"), 15)
    assert status.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in rest
    writer.close()
    await writer.wait_closed()


async def test_requests_beyond_the_queue_get_429_and_the_others_finish(serve: Serve) -> None:
    backend = FakeBackend("ok")
    backend.hold_after_chunks = 0
    running = await serve(backend, limits=GatewayLimits(max_running_requests=1, max_waiting_requests=1))
    first = asyncio.create_task(running.client.post("/v1/chat/completions", json=CHAT))
    await eventually(lambda: backend.running == 1)
    second = asyncio.create_task(running.client.post("/v1/chat/completions", json=CHAT))
    await eventually(lambda: running.gateway.admission.waiting == 1)
    assert await running.metric("dspark_gateway_requests_running") == "dspark_gateway_requests_running 1.0"
    assert await running.metric("dspark_gateway_requests_waiting") == "dspark_gateway_requests_waiting 1.0"
    refused = await running.client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    backend.release.set()
    answers = await asyncio.gather(first, second)
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_a_client_that_leaves_the_queue_frees_its_place(serve: Serve) -> None:
    backend = FakeBackend("ok")
    backend.hold_after_chunks = 0
    running = await serve(backend, limits=GatewayLimits(max_running_requests=1, max_waiting_requests=1))
    first = asyncio.create_task(running.client.post("/v1/chat/completions", json=CHAT))
    await eventually(lambda: backend.running == 1)
    async with open_request(running, stream=True):
        await eventually(lambda: running.gateway.admission.waiting == 1)
    await eventually(lambda: running.gateway.admission.waiting == 0)
    backend.release.set()
    assert (await first).status_code == 200
    assert len(backend.requests) == 1


async def test_draining_is_not_ready_refuses_new_requests_and_lets_streams_end(serve: Serve) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend)
    assert (await running.client.get("/readyz")).status_code == 200
    async with open_request(running, stream=True) as reader:
        await asyncio.wait_for(reader.readuntil(b"abc"), 15)
        drained = asyncio.create_task(running.http.drain(10))
        await eventually(lambda: running.gateway.admission.draining)
        assert (await running.client.get("/readyz")).status_code == 503
        assert (await running.client.get("/healthz")).status_code == 200
        refused = await running.client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert refused.json()["error"]["code"] == "draining"
        assert refused.json()["error"]["message"].startswith("this gateway is draining")
        backend.release.set()
        assert await drained
        rest = await asyncio.wait_for(reader.readuntil(b"data: [DONE]\n\n"), 15)
        assert b"def" in rest


@pytest.mark.parametrize("drain", [True, False], ids=["after the drain", "without a drain"])
async def test_streams_that_a_stop_cannot_wait_for_end_with_an_error_for_their_clients(
    serve: Serve, drain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend)
    async with open_request(running, stream=True) as reader:
        await asyncio.wait_for(reader.readuntil(b"abc"), 15)
        if drain:
            assert not await running.http.drain(0.01)
        await running.http.stop()
        rest = await asyncio.wait_for(reader.read(), 15)
    assert b'{"error": {"message": "this gateway shuts down' in rest
    assert rest.endswith(b"0\r\n\r\n")  # the body is complete
    assert (backend.running, backend.cancelled) == (0, 1)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_answers_that_a_drain_cannot_wait_for_are_refused_as_unavailable(serve: Serve) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend, limits=GatewayLimits(max_running_requests=1))
    asked = [asyncio.create_task(running.client.post("/v1/chat/completions", json=CHAT)) for _ in range(2)]
    await eventually(lambda: (running.gateway.admission.running, running.gateway.admission.waiting) == (1, 1))
    assert not await running.http.drain(0.01)
    for answer in await asyncio.gather(*asked):  # including the one that waited for a place
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"]["code"] == "draining"
        assert "shuts down" in answer.json()["error"]["message"]


async def test_stopping_closes_the_port_and_can_be_repeated(serve: Serve) -> None:
    running = await serve(FakeBackend())
    await running.http.stop()
    await running.http.stop()
    with pytest.raises(httpx.ConnectError):
        await running.client.get("/healthz")


async def test_a_port_that_is_taken_is_a_configuration_error(serve: Serve) -> None:
    running = await serve(FakeBackend())
    second = HttpServer(
        None, running.gateway.admission, host="127.0.0.1", port=running.http.port, keep_alive_seconds=75
    )
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{running.http.port}"):
        await second.start()


async def test_metrics_count_requests_by_route_and_generations_by_outcome(serve: Serve) -> None:
    running = await serve(FakeBackend("abc"))
    await running.client.post("/v1/chat/completions", json=CHAT)
    await running.client.post("/v1/chat/completions", json={**CHAT, "model": "x"})
    await running.client.get("/some/scanner/path")
    text = (await running.client.get("/metrics")).text
    for line in (
        'dspark_gateway_http_requests_total{code="200",route="/v1/chat/completions"} 1.0',
        'dspark_gateway_http_requests_total{code="404",route="/v1/chat/completions"} 1.0',
        'dspark_gateway_http_requests_total{code="404",route="other"} 1.0',
        'dspark_gateway_generations_total{outcome="stop"} 1.0',
        'dspark_gateway_tokens_total{kind="completion"} 4.0',
        "dspark_gateway_time_to_first_token_seconds_count 1.0",
        "dspark_gateway_accepted_length_count 1.0",
    ):
        assert line in text


async def test_the_page_is_self_contained(serve: Serve) -> None:
    running = await serve(FakeBackend())
    page = await running.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert '<html lang="en">' in page.text
    assert 'fetch("v1/chat/completions"' in page.text
    assert re.search(r"""(fetch\(|href=)["'`]/""", page.text) is None  # for proxies with a path


async def test_spans_continue_the_callers_trace_and_tell_what_speculation_did(serve: Serve) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = await serve(FakeBackend("abc"), telemetry=Telemetry(service="gateway", provider=provider))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    for probe in ("/healthz", "/readyz", "/health", "/metrics"):  # polled every few seconds, so not traced
        await running.client.get(probe)
    for stream in (False, True):
        response = await running.client.post(
            "/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers
        )
        await eventually(lambda: bool(exporter.get_finished_spans()))
        (span,) = exporter.get_finished_spans()
        exporter.clear()
        assert span.name == "POST /v1/chat/completions"
        assert f"{span.context.trace_id:032x}" == trace_id
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["dspark.request_id"] == response.headers["x-request-id"]
        assert span.attributes["dspark.completion_tokens"] == 4
        assert span.attributes["dspark.accepted_length"] == 3.0
