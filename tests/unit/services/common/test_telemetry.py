"""Tracing is off until the standard variables ask for it; nothing is global."""

import json
import logging
import sys

import pytest
from opentelemetry import trace
from prometheus_client import Counter

from dspark_core.errors import ConfigError
from services.common.logs import JsonFormatter, setup_logging
from services.common.telemetry import Telemetry


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"},
    ],
)
def test_tracing_is_off_by_default(environ: dict[str, str]):
    telemetry = Telemetry.from_env("verifier", environ)
    assert not telemetry.tracing
    with telemetry.tracer.start_as_current_span("nothing") as span:
        assert not span.is_recording()


def test_console_exporter_names_the_service(capsys: pytest.CaptureFixture[str]):
    telemetry = Telemetry.from_env("verifier", {"OTEL_TRACES_EXPORTER": "console"})
    telemetry.tracer.start_span("round").end()
    telemetry.shutdown()
    span = json.loads(capsys.readouterr().out)
    assert span["name"] == "round"
    assert span["resource"]["attributes"]["service.name"] == "dspark-verifier"
    assert not trace.get_tracer_provider().get_tracer("other").start_span("x").is_recording()


def test_an_endpoint_alone_turns_otlp_on():
    telemetry = Telemetry.from_env("gateway", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    assert telemetry.tracing
    telemetry.shutdown()


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/json"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TIMEOUT": "10s"},
            "OTEL_EXPORTER_OTLP_TIMEOUT must be a number, got '10s'",
        ),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_TRACES_SAMPLER": "ratio"}, "OTEL_TRACES_SAMPLER.*'ratio'"),
        (
            {
                "OTEL_TRACES_EXPORTER": "console",
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "10%",
            },
            "OTEL_TRACES_SAMPLER_ARG must be a number, got '10%'",
        ),
    ],
)
def test_unsupported_exporters_are_refused(environ: dict[str, str], named: str):
    with pytest.raises(ConfigError, match=named):
        Telemetry.from_env("gateway", environ)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip", "OTEL_EXPORTER_OTLP_.*zip"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "", "OTEL_EXPORTER_OTLP_.*''"),
    ],
)
def test_what_the_exporter_cannot_read_itself_is_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
):
    monkeypatch.setenv(name, value)  # it looks at the process' own
    with pytest.raises(ConfigError, match=told):
        Telemetry.from_env("gateway", {"OTEL_TRACES_EXPORTER": "otlp", name: value})


def test_services_in_one_process_do_not_share_metrics():
    one, other = Telemetry(service="a"), Telemetry(service="b")
    Counter("dspark_things", "things", registry=one.registry).inc()
    Counter("dspark_things", "things", registry=other.registry)
    assert one.registry.get_sample_value("dspark_things_total") == 1
    assert other.registry.get_sample_value("dspark_things_total") == 0


def test_metrics_tell_of_the_process():
    registry = Telemetry(service="a").registry
    assert (registry.get_sample_value("process_resident_memory_bytes") or 0) > 1e6
    assert (registry.get_sample_value("process_open_fds") or 0) > 0


def test_json_lines_carry_extras_and_exceptions():
    try:
        raise ValueError("bad page")
    except ValueError:
        record = logging.getLogger("dspark.x").makeRecord(
            "dspark.x",
            logging.ERROR,
            __file__,
            1,
            "lost %d",
            (3,),
            sys.exc_info(),
            extra={"request_id": "r-1", "color_message": "lost \x1b[1m3"},
        )
    entry = json.loads(JsonFormatter("verifier").format(record))
    assert entry["message"] == "lost 3"
    assert entry["level"] == "ERROR"
    assert entry["service"] == "verifier"
    assert entry["request_id"] == "r-1"
    assert "ValueError: bad page" in entry["exception"]
    assert entry.keys() == {"time", "level", "service", "logger", "message", "request_id", "exception"}


@pytest.mark.parametrize("environ", [{"DSPARK_LOG_LEVEL": "LOUD"}, {"DSPARK_LOG_FORMAT": "xml"}])
def test_bad_logging_settings_are_named(environ: dict[str, str]):
    with pytest.raises(ConfigError, match=next(iter(environ))):
        setup_logging("verifier", environ)
