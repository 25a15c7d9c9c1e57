"""Logs an outage of the span collector once, rather than for every batch that fails meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_log = logging.getLogger(__name__)

OTLP_LOGGER = "opentelemetry.exporter.otlp.proto.grpc.exporter"
"""Where OTLP's exporter tells what fails: a module of its own that it does not document."""


class OutageTellingExporter(SpanExporter):
    """Wraps the OTLP exporter, which logs a warning for every retry and an error for every batch."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failing = False
        logging.getLogger(OTLP_LOGGER).addFilter(self._is_news)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if self._failing and result is SpanExportResult.SUCCESS:
            _log.info("the collector takes spans again")
        self._failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        logging.getLogger(OTLP_LOGGER).removeFilter(self._is_news)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Lets only the first error of an outage through, which names the collector and the reason."""
        if record.levelno < logging.WARNING:
            return True
        return record.levelno >= logging.ERROR and not self._failing
