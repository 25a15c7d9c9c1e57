"""One trace through client, server and what the server calls in turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise

import pytest
from dspark_proto.v1 import verifier_pb2
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from dspark_core.errors import UnavailableError
from dspark_core.records import GenerateRequest
from services.common.channels import open_channel
from services.common.clients import VerifierClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from tests.support.faulty_verifier import ERRORS, FaultyVerifier
from tests.support.polling import eventually, exhaust


class ForwardingVerifier(FaultyVerifier):
    """Answers Describe by asking another verifier, as a gateway asks a scheduler."""

    def __init__(self, upstream: VerifierClient) -> None:
        super().__init__()
        self._upstream = upstream

    async def Describe(self, request, context) -> verifier_pb2.DescribeVerifierResponse:  # noqa: N802
        described = await self._upstream.describe()
        return verifier_pb2.DescribeVerifierResponse(model=described.model)


@pytest.fixture
async def client(traced_telemetry: Telemetry) -> AsyncIterator[VerifierClient]:
    """client -> forwarding server -> server"""
    options = ServerOptions(port=0, host="127.0.0.1")
    last = GrpcServer(options, [FaultyVerifier().register], traced_telemetry)
    inner = open_channel(f"127.0.0.1:{await last.start()}", traced_telemetry)
    first_telemetry = Telemetry(service="gateway", provider=traced_telemetry.provider)
    first = GrpcServer(options, [ForwardingVerifier(VerifierClient(inner)).register], first_telemetry)
    outer = open_channel(f"127.0.0.1:{await first.start()}", traced_telemetry)
    yield VerifierClient(outer, timeout_seconds=30.0)
    for channel in (outer, inner):
        await channel.close()
    for server in (first, last):
        await server.stop()


def _by_start(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return sorted(spans.get_finished_spans(), key=lambda span: span.start_time)


async def test_a_call_through_two_services_is_one_trace(
    client: VerifierClient, traced_telemetry: Telemetry, spans: InMemorySpanExporter
):
    with traced_telemetry.tracer.start_as_current_span("request"):
        await client.describe()
    await eventually(lambda: len(spans.get_finished_spans()) == 5)
    chain = _by_start(spans)
    assert [span.kind for span in chain] == [SpanKind.INTERNAL, *[SpanKind.CLIENT, SpanKind.SERVER] * 2]
    assert {span.name for span in chain[1:]} == {"dspark.v1.VerifierService/Describe"}
    assert len({span.context.trace_id for span in chain}) == 1
    assert chain[0].parent is None
    for parent, child in pairwise(chain):
        assert child.parent is not None
        assert child.parent.span_id == parent.context.span_id


async def test_housekeeping_outside_a_trace_is_not_traced(
    client: VerifierClient, spans: InMemorySpanExporter
):
    await client.describe()
    await exhaust(
        client.generate(GenerateRequest(request_id="fine", prompt_token_ids=(1,)), deadline_seconds=10)
    )
    await eventually(lambda: len(spans.get_finished_spans()) == 2)
    assert {span.name for span in spans.get_finished_spans()} == {"dspark.v1.VerifierService/Generate"}


async def test_streams_are_traced_with_their_status(client: VerifierClient, spans: InMemorySpanExporter):
    request = GenerateRequest(request_id="gone", prompt_token_ids=(1,))
    with pytest.raises(UnavailableError, match=str(ERRORS["gone"])):
        await exhaust(client.generate(request, deadline_seconds=10))
    await eventually(lambda: len(spans.get_finished_spans()) == 2)
    outer, inner = _by_start(spans)
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    for span in (outer, inner):  # a server that is killed tells nothing
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["rpc.grpc.status_code"] == 14


async def test_streams_that_end_well_are_traced_as_such(client: VerifierClient, spans: InMemorySpanExporter):
    request = GenerateRequest(request_id="fine", prompt_token_ids=(1,))
    await exhaust(client.generate(request, deadline_seconds=10))
    await eventually(lambda: len(spans.get_finished_spans()) == 2)
    for span in spans.get_finished_spans():
        assert span.status.status_code is StatusCode.UNSET
        assert (span.attributes or {})["rpc.grpc.status_code"] == 0


async def test_a_cancelled_stream_ends_its_spans(client: VerifierClient, spans: InMemorySpanExporter):
    request = GenerateRequest(request_id="wait", prompt_token_ids=(1,))
    async with asyncio.timeout(15), aclosing(client.generate(request, deadline_seconds=10)) as chunks:
        await anext(chunks)
    await eventually(lambda: len(spans.get_finished_spans()) == 2)
