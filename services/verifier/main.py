"""Starts a verifier: `python -m services.verifier.main`. Wiring only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import NoReturn

import torch

from dspark_core.engine.building import EngineOptions
from dspark_core.engine.lookup_building import build_lookup
from dspark_core.engine.planning import LocalPlanSource
from dspark_core.engine.trace_format import TraceHeader
from dspark_core.engine.trace_writer import TraceWriter
from dspark_core.engine.verifier import Verifier
from dspark_core.errors import DSparkError
from dspark_core.zoo_paths import resolve_ngrams_path
from services.common.channels import open_channel
from services.common.process import run_process
from services.common.registration import RegistrationLoop
from services.common.scheduler_link import SchedulerLink, link_to_schedulers
from services.common.server import GrpcServer, serve
from services.common.telemetry import Telemetry
from services.verifier.clients import RemoteDraftSource
from services.verifier.config import VerifierServiceConfig
from services.verifier.load import LoadMeter
from services.verifier.metrics import profile_problem
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
from services.verifier.servicer import LocalVerifier, VerifierServicer

Loader = Callable[[EngineOptions, ProfileOptions], ProfiledTarget]


async def run(environ: Mapping[str, str], load_target: Loader = load_profiled_target) -> None:
    config = VerifierServiceConfig.from_env(environ)
    telemetry = Telemetry.from_env("verifier", environ)
    if config.torch_threads:
        torch.set_num_threads(config.torch_threads)
    if config.lookup:  # a wrong name is told before the long work
        resolve_ngrams_path(config.ngrams, config.engine.target_model)
    # Loaded before the port opens: a wrong checkpoint must fail at once, not after a probe period.
    profiled = await asyncio.to_thread(load_target, config.engine, config.profile)
    async with AsyncExitStack() as stack:
        scheduler = None
        if config.scheduler_address:
            scheduler = link_to_schedulers(config.scheduler_address, telemetry, config.server.tls)
            stack.push_async_callback(scheduler.close)
        drafts = await _draft_source(config, profiled, telemetry, stack)
        draining = asyncio.Event()
        load = LoadMeter(config.limits.max_running, draining=draining.is_set)
        found = LeaderFound()
        local = local_plans(profiled)
        verifier = await _start_verifier(
            config, profiled, local, drafts, scheduler, load, found, telemetry, stack
        )
        await _serve(config, profiled, local, verifier, scheduler, load, found, draining, telemetry)


class LeaderFound:
    """Lets the plans' stream, which is there first, make the registration hurry."""

    def __init__(self) -> None:
        self.registration: RegistrationLoop | None = None

    def __call__(self) -> None:
        if self.registration is not None:
            self.registration.renew_soon()


async def _draft_source(
    config: VerifierServiceConfig, profiled: ProfiledTarget, telemetry: Telemetry, stack: AsyncExitStack
) -> RemoteDraftSource | None:
    geometry = profiled.target.geometry
    if config.drafter_address is None or geometry is None:
        return None
    channel = await stack.enter_async_context(
        open_channel(config.drafter_address, telemetry, tls=config.server.tls)
    )
    drafts = RemoteDraftSource(channel, geometry)
    drafts.start()
    stack.push_async_callback(drafts.close)
    return drafts


async def _start_verifier(
    config: VerifierServiceConfig,
    profiled: ProfiledTarget,
    local: LocalPlanSource,
    drafts: RemoteDraftSource | None,
    scheduler: SchedulerLink | None,
    load: LoadMeter,
    found: LeaderFound,
    telemetry: Telemetry,
    stack: AsyncExitStack,
) -> Verifier:
    lookup = None
    if config.lookup:
        lookup = build_lookup(config.ngrams, config.engine.target_model, profiled.target.facts)
    coordinated = None
    if scheduler is not None:
        coordinated = CoordinatedPlanSource(
            scheduler,
            local,
            profile_points(profiled.round_time),
            replica_id=config.replica_id,
            load=load.take,
            kind=profiled.kind,
            on_connected=found,
        )
    trace = _open_trace(config)
    if trace is not None:
        stack.push_async_callback(asyncio.to_thread, trace.close)
    verifier = build_verifier(
        profiled,
        local,
        coordinated,
        limits=config.limits,
        draft_source=drafts,
        draft_deadline_seconds=config.draft_deadline_seconds,
        replica_id=config.replica_id,
        metrics=telemetry.registry,
        trace=trace,
        lookup=lookup,
        cohorts=config.cohorts,
    )
    load.watch(lambda: verifier.status)
    verifier.start()
    stack.push_async_callback(asyncio.to_thread, profiled.target.engine.close)
    stack.push_async_callback(asyncio.to_thread, verifier.stop)
    if coordinated is not None:
        coordinated.start()
        stack.push_async_callback(coordinated.close)
    return verifier


def _open_trace(config: VerifierServiceConfig) -> TraceWriter | None:
    if config.trace is None:
        return None
    header = TraceHeader(
        replica_id=config.replica_id, model=config.engine.target_model, sample=config.trace.sample
    )
    return TraceWriter(config.trace, header)


async def _serve(
    config: VerifierServiceConfig,
    profiled: ProfiledTarget,
    plans: LocalPlanSource,
    verifier: Verifier,
    scheduler: SchedulerLink | None,
    load: LoadMeter,
    found: LeaderFound,
    draining: asyncio.Event,
    telemetry: Telemetry,
) -> None:
    model = config.engine.target_model
    registration = None
    if scheduler is not None:
        registration = RegistrationLoop(
            scheduler,
            lambda: replica(
                verifier,
                replica_id=config.replica_id,
                address=config.advertise_address,
                model=model,
                draining=draining.is_set(),
            ),
        )
        found.registration = registration

    async def warm_up() -> None:
        if registration:
            registration.start()

    async def on_drain() -> None:
        # Off the list first: nobody is routed here while the running requests finish.
        draining.set()
        if registration:
            await registration.stop()

    local = LocalVerifier(
        verifier, describe(config.engine, profiled), serving=load.serving, tracer=telemetry.tracer
    )
    parts = {"profile": lambda: profile_problem(plans)}
    server = GrpcServer(config.server, [VerifierServicer(local).register], telemetry, parts=parts)
    await serve(server, warm_up=warm_up, on_drain=on_drain, until=lambda: until_broken(verifier))
    problem = verifier.status.problem
    if problem is not None:
        raise DSparkError(f"the verifier is broken: {problem}")  # an exit code that supervisors see


def main() -> NoReturn:
    run_process("verifier", run)


if __name__ == "__main__":
    main()
