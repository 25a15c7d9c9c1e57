"""What a drafter process runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack

import torch

from dspark_core.engine.building import build_drafter
from dspark_core.errors import DSparkError
from dspark_core.records import Replica, Role
from dspark_core.zoo_paths import NO_DRAFTER
from services.common.registration import RegistrationLoop
from services.common.scheduler_link import link_to_schedulers
from services.common.server import GrpcServer, serve
from services.common.telemetry import Telemetry
from services.drafter.config import DrafterServiceConfig
from services.drafter.servicer import DrafterServicer

_log = logging.getLogger(__name__)


async def run(environ: Mapping[str, str]) -> None:
    config = DrafterServiceConfig.from_env(environ)
    telemetry = Telemetry.from_env("drafter", environ)
    if config.engine.drafter is None:
        # Not an error: Compose starts this service whatever drafter is chosen, and its verifier waits for it.
        _log.info("DSPARK_DRAFTER is %s: nothing to draft with, this process only answers probes", NO_DRAFTER)
        await serve(GrpcServer(config.server, [], telemetry))
        return
    if config.torch_threads:
        torch.set_num_threads(config.torch_threads)
    # Loaded before the port opens: a wrong checkpoint must fail at once, not after a probe period.
    engine = await asyncio.to_thread(build_drafter, config.engine)
    await asyncio.to_thread(engine.prepare)
    servicer = DrafterServicer(engine, telemetry, config.replica_id)
    async with AsyncExitStack() as stack:
        stack.callback(servicer.close)
        server = GrpcServer(config.server, [servicer.register], telemetry)
        registration = None
        if config.scheduler_address:
            scheduler = link_to_schedulers(config.scheduler_address, telemetry, config.server.tls)
            stack.push_async_callback(scheduler.close)
            registration = RegistrationLoop(scheduler, lambda: _replica(config))

        async def warm_up() -> None:
            if registration:
                registration.start()

        async def on_drain() -> None:
            if registration:
                await registration.stop()
            await servicer.drain()

        await serve(server, warm_up=warm_up, on_drain=on_drain, until=servicer.until_broken)
        if servicer.problem is not None:
            # An exit code that supervisors see.
            raise DSparkError(f"the drafter is broken: {servicer.problem}")


def _replica(config: DrafterServiceConfig) -> Replica:
    return Replica(
        replica_id=config.replica_id,
        role=Role.DRAFTER,
        address=config.advertise_address,
        model=config.engine.target_model,
    )
