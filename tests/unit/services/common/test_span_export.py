"""A collector that is gone for hours is told once, not with every batch."""

import logging
import socket
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from services.common.span_export import OTLP_LOGGER, OutageTellingExporter

OTLP = logging.getLogger(OTLP_LOGGER)


class Collector(SpanExporter):
    """Takes spans or not, and talks as OTLP's exporter does."""

    gone = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if not self.gone:
            return SpanExportResult.SUCCESS
        OTLP.warning("Transient error, retrying")
        OTLP.error("Failed to export traces to collector:4317, error code: UNAVAILABLE")
        return SpanExportResult.FAILURE


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def exporter(collector: Collector) -> Iterator[OutageTellingExporter]:
    exporter = OutageTellingExporter(collector)
    yield exporter
    exporter.shutdown()


def test_an_outage_is_told_at_its_beginning_and_at_its_end(
    collector: Collector, exporter: OutageTellingExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lost = "Failed to export traces to collector:4317, error code: UNAVAILABLE"
    for gone in (True, True, True, False, False, True, True):
        collector.gone = gone
        assert (exporter.export([]) is SpanExportResult.SUCCESS) is not gone
    assert caplog.messages == [lost, "the collector takes spans again", lost]


def test_the_log_is_left_as_it_was_when_it_ends(
    collector: Collector, exporter: OutageTellingExporter, caplog: pytest.LogCaptureFixture
) -> None:
    exporter.shutdown()
    collector.export([])
    assert len(caplog.messages) == 2


def test_what_otlp_s_exporter_itself_complains_of_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        otlp = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}", timeout=0.5)
        exporter = OutageTellingExporter(otlp)
        assert [exporter.export([]) for _ in range(3)] == [SpanExportResult.FAILURE] * 3
        exporter.shutdown()
    assert [record.name for record in caplog.records] == [OTLP_LOGGER]
