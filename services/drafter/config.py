"""The drafter's configuration, read from the environment once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dspark_core.engine.building import DTYPES, EngineOptions
from dspark_core.engine.devices import AUTO
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.zoo_paths import DEFAULT_DRAFTER
from services.common.env import Env
from services.common.limits import MOST_KV_CACHE_MB, MOST_THREADS
from services.common.options import ServerOptions

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
        return cls(
            engine=EngineOptions(
                target_model=env.text("DSPARK_TARGET_MODEL", DEFAULT_MODEL),
                drafter=env.text("DSPARK_DRAFTER", DEFAULT_DRAFTER),
                dtype=env.choice("DSPARK_DTYPE", "bfloat16", tuple(DTYPES)),
                device=env.text("DSPARK_DEVICE", AUTO),
                cuda_graphs=env.choice("DSPARK_CUDA_GRAPHS", "on", ("on", "off")) == "on",
                kv_cache_bytes=env.integer("DSPARK_KV_CACHE_MB", 2048, minimum=1, maximum=MOST_KV_CACHE_MB)
                * 2**20,
            ),
            server=server,
            torch_threads=env.optional_integer("DSPARK_TORCH_THREADS", minimum=1, maximum=MOST_THREADS),
            scheduler_address=env.optional_address("DSPARK_SCHEDULER_ADDRESS", several=True),
            advertise_address=address,
            replica_id=env.text("DSPARK_REPLICA_ID", f"drafter-{address}"),
        )
