"""Builds engines from checkpoints, given paths, a dtype and a memory size."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspark_core.algorithms.calibration import Calibration
from dspark_core.engine.caches.cache_size import CACHE_SETTING, DRAFT_CACHE_SETTING, PageNeeds, num_pages
from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.engine.devices import AUTO, check_device_name, device_of, resolve_device
from dspark_core.engine.draft_engines.autoregressive import AutoregressiveDraftEngine
from dspark_core.engine.draft_engines.base import ContextDraftEngine, EngineArguments
from dspark_core.engine.draft_engines.blocks import DraftEngine
from dspark_core.engine.draft_engines.gpu_blocks import GpuDraftEngine, computes
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS
from dspark_core.engine.gpu.settings import GpuSettings, gpu_settings
from dspark_core.engine.protocols import DraftGeometry
from dspark_core.engine.target.context_features import ContextProjection
from dspark_core.engine.target.target_engine import TargetEngine, longest_context
from dspark_core.errors import ConfigError
from dspark_core.kernels.library import native_kernels
from dspark_core.models.config import AnyDrafterConfig, DrafterConfig
from dspark_core.models.decoder import check_tap_layers
from dspark_core.models.drafter_calibration import read_calibration
from dspark_core.models.drafter_checkpoint import reaching_as_far
from dspark_core.models.drafter_config import read_any_config
from dspark_core.models.drafter_kinds import fingerprint_of, load_any_drafter, load_any_projection
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.loading import (
    LoadedTarget,
    TargetFacts,
    load_target,
    load_target_ends,
    read_target_facts,
)
from dspark_core.models.packing import PackingPlan, WeightChoice, pack_linears
from dspark_core.zoo_paths import resolve_drafter_path

_log = logging.getLogger(__name__)

PAGE_TOKENS = 16
NATIVE, VLLM = "native", "vllm"
ENGINES = (NATIVE, VLLM)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = tuple(choice.value for choice in WeightChoice)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of the target and the draft engine."""

    target_model: str
    drafter: str | None
    """Checkpoint directory or zoo name; None: no drafter."""
    dtype: str = "bfloat16"
    kv_cache_bytes: int = 2 * 2**30
    """Memory for the target's keys, values and context features of all sequences."""
    draft_cache_bytes: int | None = None
    """The same for the drafter; None: an eighth of `kv_cache_bytes`."""
    max_context_tokens: int | None = None
    """Lowers the model's own limit."""
    weights: str = WeightChoice.STORED.value
    """Target weights: `stored` and `full` are exact, the others approximate (`WeightChoice`)."""
    kept_layers: tuple[int, ...] = ()
    """Without a drafter: layers whose hidden states the engine stores unprojected, to be recorded."""
    native: bool = True
    """False: compute the target with PyTorch's operators even if native kernels exist."""
    device: str = AUTO
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    cuda_graphs: bool = True
    """False: on a GPU, launch every kernel separately."""
    lookup: bool = False
    """Whether drafts may also be looked up. Graphs are then recorded for their longer blocks as well."""
    engine: str = NATIVE
    """What computes the target: `native` (our own kernels or PyTorch's operators) or `vllm`."""
    vllm_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Additional vLLM engine arguments by their Python names."""
    max_running: int = 32
    """Most sequences per pass; vLLM reserves a row for each."""
    max_batch_tokens: int = 512
    """Most tokens per pass; for vLLM, too."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine == NATIVE and self.vllm_arguments:
            names = ", ".join(self.vllm_arguments)
            raise ConfigError(f"vllm arguments ({names}) need engine vllm, got {self.engine!r}")
        if self.engine == VLLM and self.weights != WeightChoice.STORED.value:
            raise ConfigError(f"engine vllm serves weights as they are stored, got weights {self.weights!r}")
        exact = WeightChoice(self.weights).exact
        if not exact and not (self.native and self.dtype == "bfloat16"):
            raise ConfigError(f"weights {self.weights} need the native kernels and dtype bfloat16")
        check_device_name(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """Raises ConfigError for a device that this machine does not have."""
        return resolve_device(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltTarget:
    engine: TargetEngine
    facts: TargetFacts
    geometry: DraftGeometry | None
    """Geometry of the drafter whose projection the engine applies."""

    @property
    def shared(self) -> LoadedTarget | None:
        """The weights in this process, for drafters to share; None if another engine holds them."""
        return self.facts if isinstance(self.facts, LoadedTarget) else None

    @property
    def loaded(self) -> LoadedTarget:
        """Raises ConfigError if another engine holds the weights."""
        if self.shared is None:
            raise ConfigError("this needs the target's weights in this process: use engine native")
        return self.shared


def build_target(options: EngineOptions, loaded: LoadedTarget | None = None) -> BuiltTarget:
    """Loads the target and, with a drafter, its projection. Raises ConfigError or CheckpointError.

    `loaded`: the target if it is already in memory; the engine then uses its device.
    """
    # Resolve names before the slow work, so that a typing error shows at once.
    directory = None if options.drafter is None else resolve_drafter_path(options.drafter)
    if options.engine == VLLM:
        return _build_vllm_target(options, directory)
    loaded = loaded or _load(options)
    projection, geometry = None, None
    if directory is not None:
        projection, geometry = _projection(directory, options, loaded, device_of(loaded.decoder))
    elif options.kept_layers:
        projection = _kept_states(options.kept_layers, loaded)
    pages = _target_pages(options, loaded, projection.feature_size if projection else 0)
    engine = TargetEngine.of_decoder(
        loaded.decoder,
        loaded.config,
        num_pages=pages,
        page_tokens=PAGE_TOKENS,
        projection=projection,
        max_context_tokens=options.max_context_tokens,
        gpu=_gpu(
            options,
            loaded,
            geometry.block_size if geometry else None,
            looked_up=BLOCK_TOKENS if options.lookup else None,
        ),
    )
    name, way = loaded.path.name, engine.computed_by
    _log.info("target %s by %s: %d KV pages of %d tokens", name, way, pages, PAGE_TOKENS)
    return BuiltTarget(engine=engine, facts=loaded, geometry=geometry)


def context_limit(options: EngineOptions, loaded: LoadedTarget, feature_size: int) -> int:
    """`max_context_tokens` of the engine that `build_target` would build with features of this size."""
    pages = _target_pages(options, loaded, feature_size)
    return longest_context(loaded.config, pages, PAGE_TOKENS, options.max_context_tokens)


def _build_vllm_target(options: EngineOptions, directory: Path | None) -> BuiltTarget:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("engine vllm needs the package vllm (docs/vllm.md)")
    facts = read_target_facts(options.target_model)
    if options.kept_layers:
        raise ConfigError("states of layers are kept by engine native only")
    projection, geometry = None, None
    if directory is not None:
        projection, geometry = _projection(directory, options, facts, options.torch_device)
    # Imported only here: the import starts vLLM.
    vllm_engine = importlib.import_module("dspark_core.vllm_engine.building")
    engine: TargetEngine = vllm_engine.build_vllm_engine(options, facts, projection, geometry)
    _log.info("target %s by %s: %d KV pages", facts.path.name, engine.computed_by, engine.num_pages)
    return BuiltTarget(engine=engine, facts=facts, geometry=geometry)


def _projection(
    directory: Path, options: EngineOptions, target: TargetFacts, device: torch.device
) -> tuple[ContextProjection, DraftGeometry]:
    module = load_any_projection(directory, target.config, options.torch_dtype).to(device)
    pack_linears(module, PackingPlan(native=options.native, byte_products=True))
    geometry = read_geometry(directory)
    projection = ContextProjection(
        project=module, target_layer_ids=module.target_layer_ids, feature_size=geometry.feature_size
    )
    return projection, geometry


def build_drafter(
    options: EngineOptions,
    loaded: LoadedTarget | None = None,
    *,
    generator: torch.Generator | None = None,
    calibrated: bool = True,
) -> ContextDraftEngine:
    """Builds a draft engine for inference. It takes embedding, LM head and device from `loaded`, or loads
    them from the target's checkpoint.

    `generator` draws uncoupled drafts; None: a newly seeded one. `calibrated`: apply the calibration stored
    with the checkpoint, if there is one.
    """
    if options.drafter is None:
        raise ConfigError("a drafter needs a checkpoint: drafter is not set")
    directory = resolve_drafter_path(options.drafter)
    target = loaded or load_target_ends(options.target_model, options.torch_dtype, options.torch_device)
    config = read_any_config(directory)
    mark = fingerprint_of(directory, config)
    calibration = _calibration(directory, config, mark) if calibrated else None
    reaching = reaching_as_far(config, target.config)
    pages = _drafter_pages(options, directory.name, reaching, device_of(target.decoder))
    drafter = load_any_drafter(directory, target.decoder, target.config, options.torch_dtype)
    drafter = drafter.to(device_of(target.decoder))
    if not isinstance(drafter, DSparkDrafter):
        drafter.pack()
        return AutoregressiveDraftEngine(
            drafter, fingerprint=mark, num_pages=pages, page_tokens=PAGE_TOKENS, generator=generator
        )
    drafter.pack(byte_products=True)
    gpu = _gpu(options, target, config.block_size)
    arguments = EngineArguments(
        fingerprint=mark, num_pages=pages, page_tokens=PAGE_TOKENS, generator=generator
    )
    scaling = calibration.scaling if calibration else None
    if gpu is not None and computes(drafter):
        return GpuDraftEngine(drafter, gpu, confidence_scaling=scaling, **arguments)
    return DraftEngine(drafter, confidence_scaling=scaling, **arguments)


def _gpu(
    options: EngineOptions, target: LoadedTarget, block_size: int | None, *, looked_up: int | None = None
) -> GpuSettings | None:
    device = device_of(target.decoder)
    if not options.native:
        return None
    return gpu_settings(device, block_size=block_size, looked_up=looked_up, graphs=options.cuda_graphs)


def read_geometry(directory: Path) -> DraftGeometry:
    """The geometry that a drafter of this checkpoint will report, without loading it."""
    config = read_any_config(directory)
    return DraftGeometry(
        fingerprint=fingerprint_of(directory, config),
        block_size=config.block_size,
        feature_size=config.backbone.hidden_size,
        vocab_size=config.backbone.vocab_size,
        context_window=config.context_window if isinstance(config, DrafterConfig) else None,
    )


def _calibration(directory: Path, config: AnyDrafterConfig, mark: str) -> Calibration | None:
    return read_calibration(
        directory,
        fingerprint=mark,
        block_size=config.block_size,
        confidence_head=isinstance(config, DrafterConfig) and config.confidence_head,
    )


def _kept_states(layers: tuple[int, ...], loaded: LoadedTarget) -> ContextProjection:
    check_tap_layers(layers, loaded.config.num_layers)
    size = len(layers) * loaded.config.hidden_size
    return ContextProjection(project=nn.Identity(), target_layer_ids=layers, feature_size=size)


def _load(options: EngineOptions) -> LoadedTarget:
    """Raises ConfigError if the requested weights are not available here; never substitutes others."""
    choice, device = WeightChoice(options.weights), options.torch_device
    if not choice.exact and device.type != "cpu":
        raise ConfigError(
            f"weights {choice.value} need the native kernels of a CPU, got device {options.device!r}"
        )
    kernels = native_kernels()
    if not choice.exact and kernels is None:
        raise ConfigError(f"weights {choice.value} need the native kernels, which this machine has not")
    if choice is WeightChoice.STORED_A8 and kernels is not None and not kernels.byte_products:
        raise ConfigError("weights stored-a8 need a processor that multiplies bytes (AVX-512 VNNI)")
    return load_target(
        options.target_model, options.torch_dtype, device, weights=choice, native=options.native
    )


def _target_pages(options: EngineOptions, loaded: LoadedTarget, feature_size: int) -> int:
    own = loaded.config.max_context_tokens
    needs = PageNeeds(
        name=loaded.path.name,
        page_bytes=PagedCache.bytes_per_page(loaded.config, PAGE_TOKENS, feature_size, options.torch_dtype),
        page_tokens=PAGE_TOKENS,
        context_tokens=min(own, options.max_context_tokens or own),
    )
    return num_pages(options.kv_cache_bytes, needs, device_of(loaded.decoder))


def _drafter_pages(options: EngineOptions, name: str, config: AnyDrafterConfig, device: torch.device) -> int:
    window = config.context_window if isinstance(config, DrafterConfig) else None
    own = options.draft_cache_bytes
    needs = PageNeeds(
        name=f"drafter {name}",
        page_bytes=PagedCache.bytes_per_page(config.backbone, PAGE_TOKENS, 0, options.torch_dtype),
        page_tokens=PAGE_TOKENS,
        context_tokens=min(config.backbone.max_context_tokens, window or 2**62),
        setting=CACHE_SETTING if own is None else DRAFT_CACHE_SETTING,
        # A drafter has few layers: an eighth holds at least as many tokens as the target's cache.
        share=8 if own is None else 1,
        spare_tokens=config.block_size,
        beyond="longer ones are not drafted for",
    )
    return num_pages(options.kv_cache_bytes if own is None else own, needs, device)
