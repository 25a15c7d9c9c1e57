"""The verifier's configuration, read from the environment once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dspark_core.engine.building import ENGINES, NATIVE, WEIGHTS, EngineOptions
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.tracing.trace_writer import DEFAULT_MAX_MB, DEFAULT_SAMPLE, TraceOptions
from dspark_core.errors import ConfigError
from dspark_core.zoo_paths import NGRAMS_AUTO
from services.common.env import Env
from services.common.limits import DEFAULT_BATCH_TOKENS, MOST_BATCH_TOKENS, MOST_RUNNING, MOST_SECONDS
from services.common.options import ServerOptions
from services.engines.settings import read_engine_options, read_torch_threads
from services.verifier.profiling import MEASURE, ProfileOptions

PORT = 50053
METRICS_PORT = 9053
DEFAULT_STEP_MS = 100.0
"""Running requests still get about ten tokens per second while prompts of others are prefilled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierServiceConfig:
    engine: EngineOptions
    limits: BatchLimits
    server: ServerOptions
    torch_threads: int | None
    drafter_address: str | None
    """None: no drafter, whatever checkpoint is configured."""
    draft_deadline_seconds: float
    """How long a round waits for drafts before it goes on without them."""
    scheduler_address: str | None
    advertise_address: str
    replica_id: str
    lookup: bool = True
    """Whether drafts may also be looked up in a request's own text and in `ngrams`."""
    ngrams: str = NGRAMS_AUTO
    """N-gram table of the target's output, in the form that `resolve_ngrams_path` takes."""
    cohorts: int | None = None
    """1, or 2: cohorts take turns, one being drafted for while the other is verified. None: whichever is
    faster by the measured times."""
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    trace: TraceOptions | None = None
    """None: rounds are not traced."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> VerifierServiceConfig:
        env = Env(environ)
        server = ServerOptions.from_env(env, port=PORT, metrics_port=METRICS_PORT)
        address = env.address("DSPARK_ADVERTISE_ADDRESS", f"127.0.0.1:{server.port}")
        shared = read_engine_options(env)
        drafter_address = env.optional_address("DSPARK_DRAFTER_ADDRESS")
        if shared.drafter is None:
            drafter_address = None
        limits = _limits(env)
        lookup = env.flag("DSPARK_LOOKUP", True)
        return cls(
            engine=replace(
                shared,
                drafter=shared.drafter if drafter_address else None,
                weights=env.choice("DSPARK_WEIGHTS", "stored", WEIGHTS),
                max_context_tokens=env.optional_integer("DSPARK_MAX_CONTEXT_TOKENS", minimum=2),
                engine=env.choice("DSPARK_ENGINE", NATIVE, ENGINES),
                lookup=lookup,
                vllm_arguments=env.json_object("DSPARK_VLLM_ARGUMENTS"),
                max_running=limits.max_running,
                max_batch_tokens=limits.max_batch_tokens,
            ),
            limits=limits,
            server=server,
            torch_threads=read_torch_threads(env),
            drafter_address=drafter_address,
            draft_deadline_seconds=env.number(
                "DSPARK_DRAFT_DEADLINE_SECONDS", 0.5, minimum=0.001, maximum=MOST_SECONDS
            ),
            scheduler_address=env.optional_address("DSPARK_SCHEDULER_ADDRESS", several=True),
            advertise_address=address,
            replica_id=env.text("DSPARK_REPLICA_ID", f"verifier-{address}"),
            lookup=lookup,
            ngrams=env.text("DSPARK_NGRAMS", NGRAMS_AUTO),
            cohorts={"auto": None, "1": 1, "2": 2}[env.choice("DSPARK_COHORTS", "auto", ("auto", "1", "2"))],
            profile=ProfileOptions(
                source=env.text("DSPARK_PROFILE", MEASURE),
                max_requests=limits.max_running,
                max_batch_tokens=limits.max_batch_tokens,
                lookup=lookup,
            ),
            trace=_trace(env),
        )


def _limits(env: Env) -> BatchLimits:
    running = env.integer("DSPARK_MAX_RUNNING", 32, minimum=1, maximum=MOST_RUNNING)
    default = max(DEFAULT_BATCH_TOKENS, running)
    tokens = env.integer("DSPARK_MAX_BATCH_TOKENS", default, minimum=1, maximum=MOST_BATCH_TOKENS)
    if tokens < running:
        raise ConfigError(
            f"DSPARK_MAX_BATCH_TOKENS must be >= DSPARK_MAX_RUNNING ({running}), got {tokens}: "
            "every running request verifies at least its anchor"
        )
    return BatchLimits(
        max_running=running,
        max_waiting=env.integer("DSPARK_MAX_WAITING", 256, minimum=1),
        max_batch_tokens=tokens,
        prefill_chunk_tokens=env.integer("DSPARK_PREFILL_CHUNK_TOKENS", 256, minimum=1),
        max_step_seconds=env.number("DSPARK_MAX_STEP_MS", DEFAULT_STEP_MS, minimum=1.0) / 1000,
    )


def _trace(env: Env) -> TraceOptions | None:
    path = env.optional_text("DSPARK_TRACE_FILE")
    if path is None:
        return None
    return TraceOptions(
        path=Path(path),
        sample=env.number("DSPARK_TRACE_SAMPLE", DEFAULT_SAMPLE, above=0.0, maximum=1.0),
        max_bytes=env.integer("DSPARK_TRACE_MAX_MB", DEFAULT_MAX_MB, minimum=1) * 2**20,
    )
