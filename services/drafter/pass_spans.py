"""Traces a drafter's passes. A pass serves many requests, so it is a trace of its own, linked to them.

Every request that is traced has a span of the pass in its own trace as well, linked to the pass: it is
recorded whenever the request is, while the pass is sampled for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Tracer, get_current_span, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()  # stateless


@contextmanager
def pass_spans(tracer: Tracer, traceparents: Sequence[str]) -> Iterator[Sequence[Span]]:
    """Yields the spans of the pass and of its traced requests. `traceparents`: one per request of the pass,
    empty for those that are not traced."""
    requests = [_PROPAGATOR.extract({"traceparent": text}) for text in traceparents if text]
    linked = [get_current_span(), *map(get_current_span, requests)]  # the first is the stream's
    size = {"dspark.requests": len(traceparents)}
    # A stream lasts for hours, and so would a trace of all its passes: this one has no parent.
    whole = tracer.start_span(
        "draft", context=Context(), links=[Link(span.get_span_context()) for span in linked], attributes=size
    )
    spans = [whole] + [
        tracer.start_span(
            "draft pass", context=request, links=[Link(whole.get_span_context())], attributes=size
        )
        for request in requests
    ]
    with ExitStack() as stack:
        for span in reversed(spans):  # the pass last, as the current one
            stack.enter_context(use_span(span, end_on_exit=True))
        yield spans
