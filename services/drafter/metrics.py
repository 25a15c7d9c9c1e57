"""Prometheus metrics of drafting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dspark_core.engine.protocols import DraftBlock

_PASS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class DrafterMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "dspark_draft_pass_seconds",
            "Duration of one draft pass.",
            buckets=_PASS_BUCKETS,
            registry=registry,
        )
        self._requests = Histogram(
            "dspark_draft_pass_requests",
            "Sequences drafted for in one pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self._tokens = Counter("dspark_drafted_tokens", "Draft tokens proposed.", registry=registry)
        self._unprimed = Counter(
            "dspark_unprimed_drafts", "Requests refused because their context was missing.", registry=registry
        )
        self._sequences = Gauge(
            "dspark_primed_sequences", "Sequences whose context is held.", registry=registry
        )

    @contextlib.contextmanager
    def timed_pass(self, requests: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds.observe(time.perf_counter() - started)
        self._requests.observe(requests)

    def watch_sequences(self, held: Callable[[], int]) -> None:
        """Read whenever metrics are scraped: streams that end free theirs without a pass after it."""
        self._sequences.set_function(held)

    def observe(self, blocks: Sequence[DraftBlock]) -> None:
        self._tokens.inc(sum(len(block.token_ids) for block in blocks))
        self._unprimed.inc(sum(block.needs_context for block in blocks))
