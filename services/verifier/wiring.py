"""What a verifier process runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import torch

from dspark_core.engine.building import EngineOptions
from dspark_core.zoo_paths import resolve_ngrams_path
from services.common.telemetry import Telemetry
from services.verifier.config import VerifierServiceConfig
from services.verifier.process import VerifierProcess
from services.verifier.profiling import ProfileOptions
from services.verifier.service import ProfiledTarget, load_profiled_target

Loader = Callable[[EngineOptions, ProfileOptions], ProfiledTarget]


async def run(environ: Mapping[str, str], load_target: Loader = load_profiled_target) -> None:
    config = VerifierServiceConfig.from_env(environ)
    telemetry = Telemetry.from_env("verifier", environ)
    if config.torch_threads:
        torch.set_num_threads(config.torch_threads)
    if config.lookup:  # report a wrong name before the slow load
        resolve_ngrams_path(config.ngrams, config.engine.target_model)
    # Loaded before the port opens: a wrong checkpoint must fail at once, not after a probe period.
    profiled = await asyncio.to_thread(load_target, config.engine, config.profile)
    await VerifierProcess(config, profiled, telemetry).run()
