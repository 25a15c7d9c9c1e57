"""Spans reach a collector over OTLP, configured by the standard variables alone."""

import asyncio

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from services.common.telemetry import Telemetry


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    async def Export(self, request, context) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802
        self.received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_shutdown_sends_what_is_buffered():
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    telemetry = Telemetry.from_env("drafter", {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"})
    telemetry.tracer.start_span("draft").end()
    await asyncio.to_thread(telemetry.shutdown)
    await server.stop(None)
    (request,) = collector.received
    (resource_spans,) = request.resource_spans
    attributes = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert attributes["service.name"] == "dspark-drafter"
    assert [span.name for scope in resource_spans.scope_spans for span in scope.spans] == ["draft"]
