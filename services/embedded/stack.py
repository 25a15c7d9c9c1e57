"""All four roles in one process: the embedded default.

The classes are the same as in a cluster; only their connections differ: method calls instead of
gRPC between gateway, scheduler and verifier, and the drafter as a local draft source.
"""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack

import torch

from dspark_core.engine.building import build_drafter
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.lookup_building import build_lookup
from dspark_core.engine.profiling.draft_profiler import profile_draft_time
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.engine.tracing.trace_format import TraceHeader
from dspark_core.engine.tracing.trace_writer import TraceWriter
from dspark_core.model_paths import resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import resolve_ngrams_path
from services.common.registration import RegistrationLoop
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.embedded.options import StackOptions
from services.embedded.ports import require_free
from services.embedded.reports import ReportsOnly
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway, build_gateway
from services.gateway.http.app import create_app
from services.gateway.http.server import HttpServer
from services.gateway.servicer import GatewayServicer
from services.gateway.verifiers.routed_backend import RoutedBackend
from services.gateway.verifiers.verifier_pool import LocalConnection, VerifierPool
from services.scheduler.scheduler import Scheduler
from services.verifier.config import DEFAULT_STEP_MS
from services.verifier.load import LoadMeter
from services.verifier.plans import CoordinatedPlanSource
from services.verifier.profiling import ProfileOptions, profile_points
from services.verifier.service import (
    ProfiledTarget,
    build_verifier,
    describe,
    load_profiled_target,
    local_plans,
    replica,
    until_broken,
)
from services.verifier.servicer import LocalVerifier

REPLICA_ID = "embedded"
DRAFT_DEADLINE_SECONDS = 30.0
"""Long, because a local drafter cannot be lost, only slow, and there is no other to turn to."""
MAINTAIN_SECONDS = 60.0
"""Interval of the scheduler's calibration checks; long, because here they take time from the rounds."""


class EmbeddedStack:
    def __init__(
        self,
        options: StackOptions,
        gateway: GatewayConfig | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`gateway`: keys, tiers, limits and origins; model and addresses come from `options`. `telemetry` is
        shut down with the stack."""
        self._options = options
        self._gateway = gateway or GatewayConfig()
        self._telemetry = telemetry or Telemetry(service="dspark")
        self._closing = AsyncExitStack()
        self._ready = False
        self._computed_by: str | None = None
        self._verifier: Verifier | None = None
        self._http: HttpServer | None = None
        self._grpc: GrpcServer | None = None

    @property
    def url(self) -> str:
        """After `start`, with the actual port even if the system chose it."""
        port = self._http.port if self._http else self._options.http_port
        return dataclasses.replace(self._options, http_port=port).url

    @property
    def grpc_port(self) -> int:
        return self._grpc.port if self._grpc else self._options.grpc_port

    @property
    def computed_by(self) -> str | None:
        """Backend that computes the target; None before `start`."""
        return self._computed_by

    async def start(self) -> None:
        """Returns when requests can be served. Raises ConfigError and CheckpointError."""
        options = self._options
        require_free(options.host, (options.http_port, options.grpc_port))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.lookup:  # rejects a wrong name before the long work
            resolve_ngrams_path(options.ngrams, options.target_model)
        profile = ProfileOptions(
            max_requests=options.max_running,
            max_batch_tokens=options.max_batch_tokens,
            lookup=options.lookup,
        )
        profiled = await asyncio.to_thread(load_profiled_target, options.engine, profile)
        self._computed_by = profiled.target.engine.computed_by
        scheduler = Scheduler(maintain_seconds=MAINTAIN_SECONDS, metrics=self._telemetry.registry)
        self._closing.push_async_callback(scheduler.close)
        await scheduler.start()
        load = LoadMeter(options.max_running)
        self._verifier = verifier = await self._start_verifier(profiled, scheduler, load)
        gateway = await self._build_gateway(profiled, scheduler, verifier, load)
        gateway.start_tasks(self._closing)
        await self._serve(gateway)
        self._ready = True

    async def wait(self) -> str:
        """Returns a message once the verifier is broken."""
        if self._verifier is None:
            raise AssertionError("wait comes after start")
        await until_broken(self._verifier)
        return "the verifier is broken"

    async def stop(self) -> None:
        """Refuses new requests, lets running ones finish within the drain time, and frees everything."""
        self._ready = False
        if self._http is not None:
            await self._http.drain(self._options.drain_seconds)
        await self._closing.aclose()
        await asyncio.to_thread(self._telemetry.shutdown)

    def kill(self) -> None:
        """Nothing to do: there are no other processes."""

    async def _start_verifier(
        self, profiled: ProfiledTarget, scheduler: Scheduler, load: LoadMeter
    ) -> Verifier:
        options = self._options
        drafts, draft_time = None, None
        if options.drafter is not None:
            drafter = await asyncio.to_thread(build_drafter, options.engine, profiled.target.shared)
            await asyncio.to_thread(drafter.prepare)
            drafts = LocalDraftSource(drafter)
            draft_time = await asyncio.to_thread(profile_draft_time, drafts, profiled.target.engine)
        lookup = None
        if options.lookup:
            lookup = build_lookup(options.ngrams, options.target_model, profiled.target.facts)
        local = local_plans(profiled, draft_time)
        reports = self._reporting(local, profiled, scheduler, load)
        verifier = build_verifier(
            profiled,
            local,
            reports,
            limits=batch_limits(options),
            draft_source=drafts,
            draft_deadline_seconds=DRAFT_DEADLINE_SECONDS,
            replica_id=REPLICA_ID,
            metrics=self._telemetry.registry,
            trace=self._open_trace(),
            lookup=lookup,
        )
        load.watch(lambda: verifier.status)
        verifier.start()
        self._closing.push_async_callback(asyncio.to_thread, profiled.target.engine.close)
        self._closing.push_async_callback(asyncio.to_thread, verifier.stop)
        reports.start()
        self._closing.push_async_callback(reports.close)
        await self._register(verifier, profiled.weights, scheduler)
        return verifier

    def _reporting(
        self, local: LocalPlanSource, profiled: ProfiledTarget, scheduler: Scheduler, load: LoadMeter
    ) -> CoordinatedPlanSource:
        """Plans locally; the scheduler is sent rounds and load, and bases admission on them."""
        return CoordinatedPlanSource(
            ReportsOnly(scheduler),
            local,
            profile_points(profiled.round_time),
            replica_id=REPLICA_ID,
            load=load.take,
            kind=profiled.kind,
        )

    def _open_trace(self) -> TraceWriter | None:
        options = self._options
        if options.trace is None:
            return None
        header = TraceHeader(replica_id=REPLICA_ID, model=options.target_model, sample=options.trace_sample)
        trace = TraceWriter(options.trace, header)
        self._closing.push_async_callback(asyncio.to_thread, trace.close)
        return trace

    async def _register(self, verifier: Verifier, weights: str, scheduler: Scheduler) -> None:
        options = self._options
        registration = RegistrationLoop(
            scheduler,
            lambda: replica(
                verifier,
                replica_id=REPLICA_ID,
                address=REPLICA_ID,
                model=options.target_model,
                weights=weights,
            ),
        )
        registration.start()
        self._closing.push_async_callback(registration.stop)
        await registration.wait_registered()

    async def _build_gateway(
        self, profiled: ProfiledTarget, scheduler: Scheduler, verifier: Verifier, load: LoadMeter
    ) -> Gateway:
        options = self._options
        path = resolve_model_path(options.target_model)
        tokenizer = await asyncio.to_thread(load_tokenizer, path, self._gateway.chat_template_kwargs)
        local = LocalVerifier(
            verifier,
            describe(options.engine, profiled),
            serving=load.serving,
            tracer=self._telemetry.tracer,
        )
        pool = VerifierPool(lambda address: LocalConnection(local))
        self._closing.push_async_callback(pool.close)
        backend = RoutedBackend(
            model=options.target_model,
            scheduler=scheduler,
            pool=pool,
            deadline_seconds=self._gateway.limits.request_timeout_seconds,
            admission_wait_seconds=options.admission_wait_seconds,
        )
        config = dataclasses.replace(self._gateway, target_model=options.target_model)
        return build_gateway(config, tokenizer, backend, self._telemetry)

    async def _serve(self, gateway: Gateway) -> None:
        options = self._options
        self._grpc = GrpcServer(
            dataclasses.replace(self._gateway.grpc, port=options.grpc_port, host=options.host),
            [GatewayServicer(gateway).register],
            self._telemetry,
        )
        await self._grpc.start()
        self._closing.push_async_callback(self._grpc.stop)
        await self._grpc.mark_ready()
        app = create_app(gateway, ready=lambda: self._ready)
        self._http = HttpServer(
            app,
            gateway.admission,
            host=options.host,
            port=options.http_port,
            keep_alive_seconds=self._gateway.http_keep_alive_seconds,
        )
        await self._http.start()
        self._closing.push_async_callback(self._http.stop)


def batch_limits(options: StackOptions) -> BatchLimits:
    return BatchLimits(
        max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens,
        max_step_seconds=DEFAULT_STEP_MS / 1000,
    )
