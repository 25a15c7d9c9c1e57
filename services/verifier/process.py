"""One verifier process: the round loop, its links to a drafter and a scheduler, and its gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from dspark_core.engine.drafts.lookup_building import build_lookup
from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.engine.tracing.trace_format import TraceHeader
from dspark_core.engine.tracing.trace_writer import TraceWriter
from dspark_core.errors import DSparkError
from dspark_core.records import GenerateRequest, Replica
from services.common.channels import open_channel
from services.common.health import Problem
from services.common.registration import RegistrationLoop
from services.common.scheduler_link import SchedulerLink, link_to_schedulers
from services.common.server import GrpcServer, serve
from services.common.telemetry import Telemetry
from services.verifier.clients import RemoteDraftSource
from services.verifier.config import VerifierServiceConfig
from services.verifier.load import LoadMeter
from services.verifier.metrics import profile_problem
from services.verifier.plans import CoordinatedPlanSource
from services.verifier.profiling import profile_points
from services.verifier.request_traces import RequestTraces
from services.verifier.service import (
    ProfiledTarget,
    build_verifier,
    describe,
    local_plans,
    replica,
    until_broken,
)
from services.verifier.servicer import LocalVerifier, VerifierServicer


class VerifierProcess:
    def __init__(self, config: VerifierServiceConfig, profiled: ProfiledTarget, telemetry: Telemetry) -> None:
        self._config = config
        self._profiled = profiled
        self._telemetry = telemetry
        self._local = local_plans(profiled)
        self._draining = asyncio.Event()
        self._load = LoadMeter(config.limits.max_running, draining=self._draining.is_set)
        self._traces = RequestTraces()
        self._registration: RegistrationLoop | None = None

    async def run(self) -> None:
        """Runs until told to stop. Raises DSparkError if the verifier breaks."""
        async with AsyncExitStack() as stack:
            scheduler = self._link_to_scheduler(stack)
            drafts = await self._connect_drafter(stack)
            verifier = self._start_verifier(scheduler, drafts, stack)
            if scheduler is not None:
                self._registration = RegistrationLoop(scheduler, lambda: self._replica(verifier))
            await self._serve(verifier, drafts)

    def _link_to_scheduler(self, stack: AsyncExitStack) -> SchedulerLink | None:
        address = self._config.scheduler_address
        if not address:
            return None
        scheduler = link_to_schedulers(address, self._telemetry, self._config.server.tls)
        stack.push_async_callback(scheduler.close)
        return scheduler

    async def _connect_drafter(self, stack: AsyncExitStack) -> RemoteDraftSource | None:
        address, geometry = self._config.drafter_address, self._profiled.target.geometry
        if address is None or geometry is None:
            return None
        channel = await stack.enter_async_context(
            open_channel(address, self._telemetry, tls=self._config.server.tls)
        )
        drafts = RemoteDraftSource(channel, geometry, traces=self._traces)
        drafts.start()
        stack.push_async_callback(drafts.close)
        return drafts

    def _start_verifier(
        self, scheduler: SchedulerLink | None, drafts: RemoteDraftSource | None, stack: AsyncExitStack
    ) -> Verifier:
        config, target = self._config, self._profiled.target
        lookup = None
        if config.lookup:
            lookup = build_lookup(config.ngrams, config.engine.target_model, target.facts)
        coordinated = None if scheduler is None else self._coordinated_plans(scheduler)
        trace = self._open_trace(stack)
        verifier = build_verifier(
            self._profiled,
            self._local,
            coordinated,
            limits=config.limits,
            draft_source=drafts,
            draft_deadline_seconds=config.draft_deadline_seconds,
            replica_id=config.replica_id,
            metrics=self._telemetry.registry,
            trace=trace,
            lookup=lookup,
            cohorts=config.cohorts,
        )
        self._load.watch(lambda: verifier.status)
        verifier.start()
        stack.push_async_callback(asyncio.to_thread, target.engine.close)
        stack.push_async_callback(asyncio.to_thread, verifier.stop)
        if coordinated is not None:
            coordinated.start()
            stack.push_async_callback(coordinated.close)
        return verifier

    def _coordinated_plans(self, scheduler: SchedulerLink) -> CoordinatedPlanSource:
        return CoordinatedPlanSource(
            scheduler,
            self._local,
            profile_points(self._profiled.round_time),
            replica_id=self._config.replica_id,
            load=self._load.take,
            kind=self._profiled.kind,
            on_connected=self._leader_found,
        )

    def _leader_found(self) -> None:
        """Registers at once: the plan stream reaches a new leader before the next renewal is due."""
        if self._registration is not None:
            self._registration.renew_soon()

    def _open_trace(self, stack: AsyncExitStack) -> TraceWriter | None:
        config = self._config
        if config.trace is None:
            return None
        header = TraceHeader(
            replica_id=config.replica_id, model=config.engine.target_model, sample=config.trace.sample
        )
        trace = TraceWriter(config.trace, header)
        stack.push_async_callback(asyncio.to_thread, trace.close)
        return trace

    def _replica(self, verifier: Verifier) -> Replica:
        return replica(
            verifier,
            replica_id=self._config.replica_id,
            address=self._config.advertise_address,
            model=self._config.engine.target_model,
            weights=self._profiled.weights,
            draining=self._draining.is_set(),
        )

    @contextmanager
    def _serving(self, request: GenerateRequest) -> Iterator[None]:
        with self._load.serving(request), self._traces.serving(request):
            yield

    async def _serve(self, verifier: Verifier, drafts: RemoteDraftSource | None) -> None:
        local = LocalVerifier(
            verifier,
            describe(self._config.engine, self._profiled),
            serving=self._serving,
            tracer=self._telemetry.tracer,
        )
        parts: dict[str, Problem] = {"profile": lambda: profile_problem(self._local)}
        if drafts is not None:
            parts["drafter"] = lambda: drafts.problem
        server = GrpcServer(
            self._config.server, [VerifierServicer(local).register], self._telemetry, parts=parts
        )
        await serve(
            server,
            warm_up=self._warm_up,
            on_drain=self._on_drain,
            until=lambda: until_broken(verifier),
        )
        problem = verifier.status.problem
        if problem is not None:
            raise DSparkError(f"the verifier is broken: {problem}")  # an exit code that supervisors see

    async def _warm_up(self) -> None:
        if self._registration is not None:
            self._registration.start()

    async def _on_drain(self) -> None:
        # Deregister first, so that nothing is routed here while running requests finish.
        self._draining.set()
        if self._registration is not None:
            await self._registration.stop()
