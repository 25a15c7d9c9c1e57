"""Options of `dspark up`, the same for one process and for four (--disaggregated)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_core.engine.building import NATIVE, EngineOptions
from dspark_core.engine.devices import AUTO
from dspark_core.engine.tracing.trace_writer import DEFAULT_MAX_MB, DEFAULT_SAMPLE, TraceOptions
from dspark_core.errors import ConfigError
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.zoo_paths import DEFAULT_DRAFTER, NGRAMS_AUTO, NO_NGRAMS
from services.common.addresses import address_of, reachable_host
from services.common.limits import DEFAULT_BATCH_TOKENS, MOST_KV_CACHE_MB, MOST_RUNNING, MOST_THREADS


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 50051
    target_model: str = DEFAULT_MODEL
    drafter: str | None = DEFAULT_DRAFTER
    """None: no draft model."""
    lookup: bool = True
    """Whether to draft also from repetitions in a request's own text and from `ngrams`."""
    ngrams: str = NGRAMS_AUTO
    """N-gram table of the target, as `resolve_ngrams_path` takes it."""
    dtype: str = "bfloat16"
    device: str = AUTO
    """For target and drafter; see `EngineOptions.device`."""
    weights: str = "stored"
    """Of the target; see `EngineOptions.weights`."""
    target_engine: str = NATIVE
    """What computes the target; see `EngineOptions.engine`."""
    vllm_arguments: Mapping[str, Any] = field(default_factory=dict)
    kv_cache_mb: int = 2048
    max_running: int = 32
    threads: int | None = None
    """Math threads of each engine; None: torch's own choice."""
    drain_seconds: float = 20.0
    admission_wait_seconds: float = 10.0
    """How long a request may wait for speed floors to allow it; then it gets 429."""
    trace_file: Path | None = None
    """File for a sample of the rounds; None: no trace."""
    trace_sample: float = DEFAULT_SAMPLE
    trace_max_mb: int = DEFAULT_MAX_MB

    def __post_init__(self) -> None:
        """Raises ConfigError naming the flag, also for trace and lookup settings while those are off."""
        for flag, value, least, most in (
            ("--port", self.http_port, 0, 65535),
            ("--grpc-port", self.grpc_port, 0, 65535),
            ("--max-running", self.max_running, 1, MOST_RUNNING),
            ("--kv-cache-mb", self.kv_cache_mb, 1, MOST_KV_CACHE_MB),
            ("--threads", self.threads, 1, MOST_THREADS),
        ):
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{flag} must be in [{least}, {most}], got {value}")
        unused = [
            f"--{name} {value}"
            for name, value, default in (
                ("trace-sample", self.trace_sample, DEFAULT_SAMPLE),
                ("trace-max-mb", self.trace_max_mb, DEFAULT_MAX_MB),
            )
            if value != default
        ]
        if self.trace is None and unused:
            raise ConfigError(f"{' and '.join(unused)} needs --trace FILE: nothing is traced without it")

        if not self.lookup and self.ngrams not in (NGRAMS_AUTO, NO_NGRAMS):
            raise ConfigError(f"--ngrams {self.ngrams} cannot be used with --no-lookup")

    @property
    def max_batch_tokens(self) -> int:
        return max(DEFAULT_BATCH_TOKENS, self.max_running)

    @property
    def engine(self) -> EngineOptions:
        return EngineOptions(
            target_model=self.target_model,
            drafter=self.drafter,
            dtype=self.dtype,
            device=self.device,
            weights=self.weights,
            kv_cache_bytes=self.kv_cache_mb * 2**20,
            lookup=self.lookup,
            engine=self.target_engine,
            vllm_arguments=self.vllm_arguments,
            max_running=self.max_running,
            max_batch_tokens=self.max_batch_tokens,
        )

    @property
    def trace(self) -> TraceOptions | None:
        if self.trace_file is None:
            return None
        return TraceOptions(
            path=self.trace_file, sample=self.trace_sample, max_bytes=self.trace_max_mb * 2**20
        )

    @property
    def url(self) -> str:
        return f"http://{address_of(reachable_host(self.host), self.http_port)}"
