"""Takes traced requests' contexts along to the drafter, whose passes serve many requests each.

Requests are served on an event loop, draft messages are made on the round thread; each call is one operation
on a dict, so no lock is needed. While nothing is traced, `any` is False and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry.trace import Span, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dspark_core.records import GenerateRequest

SINGLE_DRAFTS = 16
"""Drafts of a request that are all traced; later the 32nd, the 64th and so on, so that a request of n drafts
has at most 16 + log2(n) spans at drafters."""

_PROPAGATOR = TraceContextTextMapPropagator()  # stateless


@dataclass(slots=True)
class _Traced:
    traceparent: str
    drafts: int = 0


class RequestTraces:
    def __init__(self) -> None:
        self._running: dict[str, _Traced] = {}

    @property
    def any(self) -> bool:
        """Whether a running request is traced."""
        return bool(self._running)

    @contextmanager
    def serving(self, request: GenerateRequest) -> Iterator[None]:
        """Enter around a request, in the context of its span."""
        span = get_current_span()
        if not span.is_recording():
            yield
            return
        self._running[request.request_id] = _Traced(_traceparent(span))
        try:
            yield
        finally:
            self._running.pop(request.request_id, None)

    def next_draft(self, request_id: str) -> str:
        """W3C trace context for the request's next draft; empty: not to be traced."""
        traced = self._running.get(request_id)
        if traced is None:
            return ""
        traced.drafts += 1
        wanted = traced.drafts <= SINGLE_DRAFTS or traced.drafts.bit_count() == 1
        return traced.traceparent if wanted else ""


def _traceparent(span: Span) -> str:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span))
    return carrier["traceparent"]
