"""A drafter's passes in traces: a stream lasts for hours, no trace should."""

from __future__ import annotations

import asyncio

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common.telemetry import Telemetry
from tests.integration.drafting.test_broken_drafter import Failing
from tests.integration.drafting.test_draft_source import connected, drafter_server, item
from tests.support.polling import eventually


async def test_every_pass_is_a_trace_of_its_own_that_names_its_stream(
    traced_telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    engine = Failing([])
    async with drafter_server(engine, telemetry=traced_telemetry) as server:
        async with connected(server.port, engine) as source:
            await source.wait_connected()
            for end in (5, 6):
                await asyncio.wrap_future(source.propose([item("a", 0, end)]))
        ended = spans.get_finished_spans
        await eventually(lambda: any(span.name.endswith("/Draft") for span in ended()))
    (stream,) = [span for span in ended() if span.name.endswith("/Draft")]
    passes = [span for span in ended() if span.name == "draft"]
    assert [span.parent for span in passes] == [None, None]
    assert len({span.context.trace_id for span in (stream, *passes)}) == 3
    for span in passes:
        assert [link.context.span_id for link in span.links] == [stream.context.span_id]
        assert (span.attributes or {})["requests"] == 1
