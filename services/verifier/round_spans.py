"""Traces a request's rounds as children of its span: the time drafting and verifying took, and the outcome.

Spans are created after the fact from the statistics that every chunk carries. Their number stays small: the
first rounds have spans of their own, later ones share spans, each covering twice as many rounds as the last.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from opentelemetry.trace import Span, Tracer, get_current_span, set_span_in_context

from dspark_core.records import GenerateChunk, SpeculationStats

SINGLE_ROUNDS = 16
"""Rounds with spans of their own. A request of n rounds has at most 2 * (17 + log2(n)) round spans."""


async def with_round_spans(
    chunks: AsyncIterator[GenerateChunk], tracer: Tracer, clock: Callable[[], int] = time.time_ns
) -> AsyncGenerator[GenerateChunk, None]:
    """Passes the chunks through. The parent is the span that is current when the first chunk is requested."""
    parent = get_current_span()
    spans = RoundSpans(parent, tracer, clock) if parent.is_recording() else None
    try:
        async for chunk in chunks:
            if spans is not None:
                spans.observe(chunk)
            yield chunk
    finally:
        if spans is not None:
            spans.end()


class RoundSpans:
    def __init__(self, parent: Span, tracer: Tracer, clock: Callable[[], int]) -> None:
        """`clock`: nanoseconds since 1970."""
        self._context = set_span_in_context(parent)
        self._tracer = tracer
        self._clock = clock
        self._arrived_at = clock()
        self._first_token_came = False
        self._covered = SpeculationStats()
        """Statistics up to the last round covered by a span."""
        self._seen = self._covered
        self._seen_at = self._arrived_at
        self._began_at: int | None = None
        """When the first round not yet covered by a span began."""
        self._made = 0

    def observe(self, chunk: GenerateChunk) -> None:
        now = self._clock()
        if not self._first_token_came:
            self._first_token_came = True
            self._span("prefill", self._arrived_at, now, cached_prompt_tokens=chunk.cached_prompt_tokens)
        stats = chunk.stats
        if stats is None or stats.rounds <= self._seen.rounds:
            return
        if self._began_at is None:
            taken = stats.draft_seconds + stats.verify_seconds
            taken -= self._seen.draft_seconds + self._seen.verify_seconds
            self._began_at = now - _nanoseconds(taken)
        self._seen, self._seen_at = stats, now
        window = 2 ** max(self._made - SINGLE_ROUNDS + 1, 0)
        if stats.rounds - self._covered.rounds >= window:
            self._emit_spans()

    def end(self) -> None:
        """Creates spans for the rounds of an incomplete window."""
        if self._began_at is not None:
            self._emit_spans()

    def _emit_spans(self) -> None:
        before, after = self._covered, self._seen
        draft_seconds = after.draft_seconds - before.draft_seconds
        verify_seconds = after.verify_seconds - before.verify_seconds
        which = {"round": before.rounds + 1, "rounds": after.rounds - before.rounds}
        drafted = after.drafted_tokens - before.drafted_tokens
        assert self._began_at is not None
        if drafted:
            self._span(
                "draft",
                self._began_at,
                self._began_at + _nanoseconds(draft_seconds),
                **which,
                drafted=drafted,
                draft_ms=1000 * draft_seconds,
            )
        self._span(
            "verify",
            self._seen_at - _nanoseconds(verify_seconds),
            self._seen_at,
            **which,
            verified=after.verified_tokens - before.verified_tokens,
            accepted=after.accepted_tokens - before.accepted_tokens,
            committed=after.committed_tokens - before.committed_tokens,
            verify_ms=1000 * verify_seconds,
        )
        self._covered, self._began_at, self._made = after, None, self._made + 1

    def _span(self, name: str, begin: int, end: int, **attributes: float) -> None:
        named = {f"dspark.{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(name, context=self._context, start_time=begin, attributes=named)
        span.end(end)


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
