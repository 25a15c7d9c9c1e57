"""Times variants of one layer's attention over the same pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.engine_parts.steps import Shape
from benchmarks.gpu_parts.timing import interleaved
from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.engine.gpu.attention import AttentionKernels, RaggedRuns
from dspark_core.engine.target.attention import PagedAttention
from dspark_core.engine.target.batch import Run, attention_groups, build_batch
from dspark_core.engine.target.step_inputs import StepInputs, exact_shape, pack_step
from dspark_core.models.config import DecoderConfig

PAGE = 16


def attention_row(
    config: DecoderConfig,
    variants: Mapping[str, AttentionKernels],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    repeats: int,
) -> dict[str, object]:
    """Microseconds to write keys and values and attend, per variant, and bytes per second of the best.

    Adds the variant "gathered": gathered pages with PyTorch's own attention, as in `TorchPasses`.
    """
    each = -(-(shape.context + shape.tokens) // PAGE)
    runs = [
        Run([1] * shape.tokens, shape.context, range(1 + i * each, 1 + (i + 1) * each), 1)
        for i in range(shape.requests)
    ]
    one_layer = PagedCache(
        _with_one_layer(config),
        num_pages=1 + each * shape.requests,
        page_tokens=PAGE,
        dtype=dtype,
        device=device,
    )
    tokens = shape.requests * shape.tokens
    q = torch.randn(tokens, config.num_heads, config.head_dim, device=device).to(dtype)
    k, v = torch.randn(2, tokens, config.num_kv_heads, config.head_dim, device=device).to(dtype)
    actions: dict[str, Callable[[], object]] = {
        name: _ragged(kernels, config, runs, one_layer, q, k, v, device) for name, kernels in variants.items()
    }
    actions["gathered"] = _gathered(runs, one_layer, q, k, v, dtype, device)
    seconds = interleaved(actions, device, repeats=repeats)
    read = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    best = min(seconds.values())
    return {
        "requests": shape.requests,
        "tokens_per_request": shape.tokens,
        "context": shape.context,
        **{f"{name}_us": 1e6 * value for name, value in seconds.items()},
        "gigabytes_per_second": shape.requests * (shape.context + shape.tokens) * read / best / 1e9,
    }


def _ragged(
    kernels: AttentionKernels,
    config: DecoderConfig,
    runs: list[Run],
    cache: PagedCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    device: torch.device,
) -> Callable[[], object]:
    batch = build_batch(runs, page_tokens=PAGE)
    group = config.num_heads // config.num_kv_heads
    queries = kernels.tile_queries(
        len(runs[0].token_ids), group=group, head_dim=config.head_dim, value_bytes=q.element_size()
    )
    shape = exact_shape(batch, queries)
    inputs = StepInputs.of(pack_step(batch, shape).to(device), shape)
    where = RaggedRuns(inputs.runs, inputs.tiles, inputs.pages, shape.tile_queries, PAGE)

    def attend() -> Tensor:
        kernels.store(k, v, cache.keys[0], cache.values[0], inputs.slots)
        return kernels.attend(q, cache.keys[0], cache.values[0], where, None)

    return attend


def _gathered(
    runs: list[Run],
    cache: PagedCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], object]:
    slots = build_batch(runs, page_tokens=PAGE).slots.to(device)
    groups = [group.to(device) for group in attention_groups(runs, page_tokens=PAGE, dtype=dtype)]
    attend = PagedAttention(cache, slots, lambda window: groups)
    return lambda: attend(0, q, k, v)


def _with_one_layer(config: DecoderConfig) -> DecoderConfig:
    return replace(config, num_layers=1)
