"""Starts vLLM's workers on a model and builds a target engine from them."""

from __future__ import annotations

import os

import torch

from dspark_core.engine.building import EngineOptions
from dspark_core.engine.caches.cache_size import CACHE_SETTING, PageNeeds, num_pages
from dspark_core.engine.devices import AUTO
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS
from dspark_core.engine.profiling.profile_passes import CHUNK_TOKENS
from dspark_core.engine.protocols import DraftGeometry
from dspark_core.engine.target.context_features import ContextProjection
from dspark_core.engine.target.passes import TapWriter
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.models.loading import TargetFacts
from dspark_core.vllm_engine.passes import VllmPasses

# Read when vLLM is imported: the model runner that `worker.py` is written for, no telemetry, few logs.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import KVCacheConfig

from dspark_core.vllm_engine.worker import PROPOSER, WORKER

TAP_LAYERS = "dspark_tap_layers"
FIT_CACHE = -1
"""As `max_model_len`: the model's own limit, or what the cache can hold if that is less."""


class _Core(EngineCore):  # type: ignore[misc]  # vLLM lives in a separate environment
    """vLLM's start-up of workers and cache, without its scheduler."""

    def __init__(self, config: VllmConfig, executor: Executor) -> None:
        self.vllm_config = config
        self.model_executor = executor

    def start_cache(self) -> KVCacheConfig:
        found: KVCacheConfig = self._initialize_kv_caches(self.vllm_config)
        return found


def build_vllm_engine(
    options: EngineOptions,
    facts: TargetFacts,
    projection: ContextProjection | None,
    geometry: DraftGeometry | None,
) -> TargetEngine:
    """Loads the model, compiles it and captures graphs as vLLM does. Raises ConfigError."""
    block_size = 0 if geometry is None else geometry.block_size
    layers = () if projection is None else projection.target_layer_ids
    config = configuration(options, facts, most_drafts=max(block_size, BLOCK_TOKENS), tap_layers=layers)
    device = torch.device(config.device_config.device)
    check_device(options.device, device)
    if projection is not None:
        projection.project.to(device)
    limit = min(config.model_config.max_model_len, facts.config.max_context_tokens)
    executor = Executor.get_class(config)(config)
    try:
        cache, page_tokens = _started(config, executor, projection)
        _check_room(options, facts.path.name, limit, cache.num_blocks, page_tokens)
    except BaseException:
        executor.shutdown()
        raise

    def passes_of(taps: TapWriter | None) -> VllmPasses:
        return VllmPasses(
            executor,
            version=vllm.__version__,
            device=device,
            max_runs=config.scheduler_config.max_num_seqs,
            taps=taps,
            elsewhere=config.parallel_config.world_size > 1,
        )

    return TargetEngine(
        passes_of,
        facts.config,
        dtype=options.torch_dtype,
        device=device,
        num_pages=cache.num_blocks,
        page_tokens=page_tokens,
        projection=projection,
        max_context_tokens=config.model_config.max_model_len,
        features_at_once=device.type != "cpu",
        on_close=executor.shutdown,
    )


def check_device(name: str, device: torch.device) -> None:
    """Raises ConfigError unless the named device is the one on which vLLM computes."""
    if name == AUTO:
        return
    given = torch.device(name)
    if given.type != device.type or given.index not in (None, 0):
        raise ConfigError(
            f"engine vllm computes on {device.type}, got device {name!r}: set auto, "
            "and choose among GPUs by CUDA_VISIBLE_DEVICES"
        )


def _started(
    config: VllmConfig, executor: Executor, projection: ContextProjection | None
) -> tuple[KVCacheConfig, int]:
    """The workers' cache, and the number of positions per page."""
    if projection is not None:
        for reason in executor.collective_rpc("dspark_tap", args=(projection.target_layer_ids,)):
            if reason is not None:
                raise ConfigError(f"a drafter needs hidden states, and {reason}")
    try:
        cache = _Core(config, executor).start_cache()
    except ValueError as error:
        size = config.cache_config.kv_cache_memory_bytes / 2**20
        limit = config.model_config.max_model_len
        raise ConfigError(
            f"vLLM refuses {CACHE_SETTING} {size:g} for DSPARK_MAX_CONTEXT_TOKENS {limit}: {error}"
        ) from error
    return cache, _page_tokens(cache)


def _check_room(options: EngineOptions, name: str, context_tokens: int, pages: int, page_tokens: int) -> None:
    """As with the native engine: warns if a whole context does not fit, refuses if hardly any does."""
    needs = PageNeeds(
        name=name,
        page_bytes=options.kv_cache_bytes // pages,
        page_tokens=page_tokens,
        context_tokens=context_tokens,
    )
    num_pages(options.kv_cache_bytes, needs, torch.device("cpu"))


def configuration(
    options: EngineOptions, facts: TargetFacts, *, most_drafts: int, tap_layers: tuple[int, ...]
) -> VllmConfig:
    """Raises ConfigError."""
    ours = {
        "model": str(facts.path),
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": options.max_context_tokens or FIT_CACHE,
        "max_num_seqs": options.max_running,
        "max_num_batched_tokens": max(options.max_batch_tokens, CHUNK_TOKENS),  # includes profiling passes
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "enable_prefix_caching": False,  # done by this project's cache
        "async_scheduling": False,
        "disable_hybrid_kv_cache_manager": True,  # one page table for all layers
        "disable_log_stats": True,
        "pipeline_parallel_size": 1,  # tried: the last stage did not get the first one's hidden states
        "data_parallel_size": 1,
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSER,
            "num_speculative_tokens": most_drafts,
        },
        "worker_extension_cls": WORKER,
    }
    clash = sorted(set(ours) & set(options.vllm_arguments))
    if clash:
        raise ConfigError(f"vllm arguments {', '.join(clash)} are set by dspark itself: leave them out")
    try:
        # Compiled graphs contain the taps but are stored under the configuration's hash, so name them there.
        additional = {**options.vllm_arguments.get("additional_config", {}), TAP_LAYERS: list(tap_layers)}
        arguments = {**ours, **options.vllm_arguments, "additional_config": additional}
        return EngineArgs(**arguments).create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses its arguments: {error}") from error


def _page_tokens(cache: KVCacheConfig) -> int:
    groups = cache.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ConfigError(f"the model's layers must share one kind of cache, vLLM has {len(groups)}: {kinds}")
    return int(groups[0].kv_cache_spec.block_size)
