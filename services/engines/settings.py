"""Reads, from the environment, the settings that a drafter and a verifier have in common."""

from __future__ import annotations

from dspark_core.engine.building import DTYPES, EngineOptions
from dspark_core.engine.devices import AUTO, check_device_name
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.zoo_paths import DEFAULT_DRAFTER, NO_DRAFTER
from services.common.env import Env
from services.common.limits import MOST_KV_CACHE_MB, MOST_THREADS


def read_engine_options(env: Env) -> EngineOptions:
    drafter = env.text("DSPARK_DRAFTER", DEFAULT_DRAFTER)
    device = env.text("DSPARK_DEVICE", AUTO)
    check_device_name(device, "DSPARK_DEVICE")
    return EngineOptions(
        target_model=env.text("DSPARK_TARGET_MODEL", DEFAULT_MODEL),
        drafter=None if drafter == NO_DRAFTER else drafter,
        dtype=env.choice("DSPARK_DTYPE", "bfloat16", tuple(DTYPES)),
        device=device,
        cuda_graphs=env.choice("DSPARK_CUDA_GRAPHS", "on", ("on", "off")) == "on",
        kv_cache_bytes=env.integer("DSPARK_KV_CACHE_MB", 2048, minimum=1, maximum=MOST_KV_CACHE_MB) * 2**20,
    )


def read_torch_threads(env: Env) -> int | None:
    """None: PyTorch's own choice."""
    return env.optional_integer("DSPARK_TORCH_THREADS", minimum=1, maximum=MOST_THREADS)
