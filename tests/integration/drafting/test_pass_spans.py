"""A drafter's passes in traces: each is a trace of its own, and shows in the traces of those it served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanContext, StatusCode

from dspark_core.errors import DraftUnavailableError
from dspark_core.records import GenerateRequest
from services.common.telemetry import Telemetry
from services.verifier.request_traces import RequestTraces
from tests.integration.drafting.test_broken_drafter import OUR_FAULT, Failing
from tests.integration.drafting.test_draft_source import connected, drafter_server, item
from tests.support.polling import eventually


@contextmanager
def running(traces: RequestTraces, *names: str) -> Iterator[dict[str, SpanContext]]:
    """Traced requests at a verifier, each in a trace of its own; their spans by name."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("verifier")
    spans = {}
    with ExitStack() as stack:
        for name in names:
            span = stack.enter_context(tracer.start_as_current_span(name, context=Context()))
            stack.enter_context(traces.serving(GenerateRequest(request_id=name, prompt_token_ids=(1,))))
            spans[name] = span.get_span_context()
        yield spans


async def drafted(engine: Failing, telemetry: Telemetry, traces: RequestTraces, *rounds: str) -> None:
    """One pass for each of `rounds`, which names requests like `a b`. Failures are the engine's."""
    async with (
        drafter_server(engine, telemetry=telemetry) as server,
        connected(server.port, engine, traces=traces) as source,
    ):
        for names in rounds:
            await source.wait_connected()
            try:
                await asyncio.wrap_future(source.propose([item(name, 0, 5) for name in names.split()]))
            except DraftUnavailableError:
                assert engine.ends == []


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


async def test_every_pass_is_a_trace_of_its_own_that_names_its_stream(
    traced_telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    await drafted(Failing([]), traced_telemetry, RequestTraces(), "a", "a")
    await eventually(lambda: any(span.name.endswith("/Draft") for span in spans.get_finished_spans()))
    (stream,) = [span for span in spans.get_finished_spans() if span.name.endswith("/Draft")]
    passes = named(spans, "draft")
    assert [span.parent for span in passes] == [None, None]
    assert len({span.context.trace_id for span in (stream, *passes)}) == 3
    for span in passes:
        assert linked(span) == [stream.context.span_id]
        assert (span.attributes or {})["dspark.requests"] == 1
    assert named(spans, "draft pass") == []


async def test_a_pass_shows_in_the_traces_of_the_requests_it_served(
    traced_telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    traces = RequestTraces()
    with running(traces, "a", "b") as requests:
        await drafted(Failing([]), traced_telemetry, traces, "a untraced b")
    (whole,) = named(spans, "draft")
    assert linked(whole)[1:] == [requests["a"].span_id, requests["b"].span_id]
    found = {span.context.trace_id: span for span in named(spans, "draft pass")}
    assert found.keys() == {request.trace_id for request in requests.values()}
    for request in requests.values():
        span = found[request.trace_id]
        assert span.parent is not None
        assert span.parent.span_id == request.span_id
        assert linked(span) == [whole.context.span_id]
        assert (span.attributes or {})["dspark.requests"] == 3
        assert (span.attributes or {})["dspark.compute_ms"] >= 0


async def test_a_sampled_request_has_its_passes_though_they_are_not_sampled_themselves(
    spans: InMemorySpanExporter,
) -> None:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    traces = RequestTraces()
    with running(traces, "a"):
        await drafted(Failing([]), Telemetry(service="drafter", provider=provider), traces, "a", "a")
    assert [span.name for span in spans.get_finished_spans()] == ["draft pass"] * 2


@pytest.mark.parametrize("tracing", [True, False])
async def test_a_failed_pass_is_an_error_in_all_of_its_spans(
    tracing: bool, traced_telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    traces = RequestTraces()
    with running(traces, "a"):
        telemetry = traced_telemetry if tracing else Telemetry(service="drafter")
        await drafted(Failing([OUR_FAULT]), telemetry, traces, "a")
    ended = [*named(spans, "draft"), *named(spans, "draft pass")]
    assert [span.status.status_code for span in ended] == [StatusCode.ERROR] * (2 if tracing else 0)
