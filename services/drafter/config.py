"""The drafter's configuration, read from the environment once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dspark_core.engine.building import EngineOptions
from services.common.env import Env
from services.common.limits import MOST_KV_CACHE_MB
from services.common.options import ServerOptions
from services.engines.settings import read_engine_options, read_torch_threads

PORT = 50054
METRICS_PORT = 9054


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterServiceConfig:
    engine: EngineOptions
    server: ServerOptions
    torch_threads: int | None
    scheduler_address: str | None
    """None: the drafter does not register; verifiers know its address."""
    advertise_address: str
    replica_id: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> DrafterServiceConfig:
        env = Env(environ)
        server = ServerOptions.from_env(env, port=PORT, metrics_port=METRICS_PORT)
        address = env.address("DSPARK_ADVERTISE_ADDRESS", f"127.0.0.1:{server.port}")
        cache_mb = env.optional_integer("DSPARK_DRAFT_CACHE_MB", minimum=1, maximum=MOST_KV_CACHE_MB)
        return cls(
            engine=replace(
                read_engine_options(env),
                draft_cache_bytes=None if cache_mb is None else cache_mb * 2**20,
            ),
            server=server,
            torch_threads=read_torch_threads(env),
            scheduler_address=env.optional_address("DSPARK_SCHEDULER_ADDRESS", several=True),
            advertise_address=address,
            replica_id=env.text("DSPARK_REPLICA_ID", f"drafter-{address}"),
        )
