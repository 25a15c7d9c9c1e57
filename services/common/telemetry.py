"""One service's metrics registry and tracer, built once in main and passed to what needs them.

Nothing here is global, so that several services can live in one process. Tracing follows the
standard OTEL_* variables; unless they ask for it, it is off and its SDK is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry, ProcessCollector

from dspark_core.errors import ConfigError
from services.common.env import Env

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_TRACER_NAME = "dspark"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_SAMPLERS = (
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
    "always_on",
    "always_off",
    "traceidratio",
)


def process_registry() -> CollectorRegistry:
    """A registry with the standard `process_*` metrics: memory, CPU time, open files, start time."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    service: str
    registry: CollectorRegistry = field(default_factory=process_registry)
    provider: TracerProvider | None = None
    """None: tracing is off."""

    @classmethod
    def from_env(cls, service: str, environ: Mapping[str, str]) -> Telemetry:
        """Raises ConfigError for unsupported exporters and protocols and for invalid settings."""
        return cls(service=service, provider=_provider_from_env(service, Env(environ)))

    @property
    def tracing(self) -> bool:
        return self.provider is not None

    @property
    def tracer(self) -> Tracer:
        """While tracing is off, its spans cost next to nothing and go nowhere."""
        return self.provider.get_tracer(_TRACER_NAME) if self.provider else NoOpTracer()

    def shutdown(self) -> None:
        """Sends what is buffered; may block for as long as the exporter's timeout."""
        if self.provider:
            self.provider.shutdown()


def _provider_from_env(service: str, env: Env) -> TracerProvider | None:
    exporter_name = _exporter_name(env)
    if exporter_name == "none":
        return None
    _refuse_unknown_sampler(env)
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    name = env.text("OTEL_SERVICE_NAME", f"dspark-{service}")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False)
    if exporter_name == "console":
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stdout)))
    else:
        provider.add_span_processor(BatchSpanProcessor(_otlp_exporter(env)))
    return provider


def _exporter_name(env: Env) -> str:
    if env.flag("OTEL_SDK_DISABLED", False):
        return "none"
    configured = any(env.optional_text(name) for name in _ENDPOINTS)
    return env.choice("OTEL_TRACES_EXPORTER", "otlp" if configured else "none", ("otlp", "console", "none"))


def _refuse_unknown_sampler(env: Env) -> None:
    """The SDK, which reads these variables itself, only warns once of a wrong one and traces everything."""
    sampler = env.text("OTEL_TRACES_SAMPLER", _SAMPLERS[0])
    if sampler.lower() not in _SAMPLERS:
        raise ConfigError(f"OTEL_TRACES_SAMPLER must be one of {', '.join(_SAMPLERS)}, got {sampler!r}")
    if sampler.lower().endswith("traceidratio"):
        env.number("OTEL_TRACES_SAMPLER_ARG", 1.0, minimum=0, maximum=1)


def _otlp_exporter(env: Env) -> SpanExporter:
    protocol = env.text("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", env.text("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"))
    if protocol != "grpc":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc, got {protocol!r}")
    for name in _TIMEOUTS:  # the exporter reads them itself, but its errors do not name the variable
        env.number(name, 0.0, minimum=0)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    from services.common.span_export import OutageTellingExporter

    endpoint = next((value for name in _ENDPOINTS if (value := env.optional_text(name))), None)
    try:
        exporter = OTLPSpanExporter(endpoint=endpoint)
    except Exception as error:  # it reads further variables and has its own errors for them
        raise ConfigError(f"OTEL_EXPORTER_OTLP_* cannot be read: {error}") from error
    return OutageTellingExporter(exporter)
