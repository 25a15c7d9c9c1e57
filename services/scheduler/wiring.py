"""What a scheduler process runs."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.server import GrpcServer, serve
from services.common.telemetry import Telemetry
from services.scheduler.config import LeaderElection, SchedulerConfig
from services.scheduler.leadership.locks import leader_lock
from services.scheduler.scheduler import Scheduler
from services.scheduler.servicer import CALLS_APART, SchedulerServicer
from services.scheduler.storage.documents import DocumentStore
from services.scheduler.storage.redis_documents import RedisDocumentStore
from services.scheduler.storage.registry import MemoryRegistry, RedisRegistry, Registry

RENEWALS_PER_LOCK = 4


async def run(environ: Mapping[str, str]) -> None:
    config = SchedulerConfig.from_env(environ)
    telemetry = Telemetry.from_env("scheduler", environ)
    registry: Registry = MemoryRegistry()
    lock = leader_lock(config, environ)
    curves: DocumentStore | None = None
    calibrations: DocumentStore | None = None
    if config.redis_url:
        keys = config.redis_keys
        registry = RedisRegistry(config.redis_url, keys=keys)
        locked = config.elected_by is LeaderElection.REDIS
        curves = RedisDocumentStore(config.redis_url, keys.curves, locked=locked, keys=keys)
        calibrations = RedisDocumentStore(config.redis_url, keys.calibration, locked=locked, keys=keys)
    scheduler = Scheduler(
        lease_seconds=config.lease_seconds,
        registry=registry,
        sync_seconds=config.sync_seconds,
        max_waiting=config.max_waiting_requests,
        lock=lock,
        curves=curves,
        calibrations=calibrations,
        renew_seconds=config.lock_seconds / RENEWALS_PER_LOCK,
        metrics=telemetry.registry,
    )
    server = GrpcServer(
        config.server,
        [SchedulerServicer(scheduler).register],
        telemetry,
        parts={"weights": scheduler.weights_problem},
        apart=CALLS_APART,
    )
    try:
        await serve(server, warm_up=scheduler.start, on_drain=scheduler.drain, until=scheduler.until_refused)
    finally:
        await scheduler.close()
