"""Tells once that the collector of spans is gone: batches follow each other for as long as it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_log = logging.getLogger(__name__)

_OTLP_LOGGER = "opentelemetry.exporter.otlp.proto.grpc.exporter"


class OutageTellingExporter(SpanExporter):
    """Around OTLP's, whose log warns of every retry and has an error for every batch."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failing = False
        logging.getLogger(_OTLP_LOGGER).addFilter(self._is_news)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if self._failing and result is SpanExportResult.SUCCESS:
            _log.info("the collector takes spans again")
        self._failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        logging.getLogger(_OTLP_LOGGER).removeFilter(self._is_news)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """The first error of an outage: it names the collector and the reason."""
        if record.levelno < logging.WARNING:
            return True
        return record.levelno >= logging.ERROR and not self._failing
