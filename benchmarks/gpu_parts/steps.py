"""Target steps and draft passes by batch size: replayed, launched, and compared with the floor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.engine_parts.floors import Machine, work_of_step
from benchmarks.engine_parts.steps import Shape
from benchmarks.gpu_parts.timing import interleaved
from dspark_core.algorithms.sampling import greedy_tokens
from dspark_core.engine.draft_engines.base import ContextDraftEngine
from dspark_core.engine.protocols import DraftItem
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.models.decoder import Decoder
from dspark_core.records import SamplingParams, Verification

Row = dict[str, object]


def step_row(
    engines: dict[str, TargetEngine], decoder: Decoder, shape: Shape, machine: Machine, *, repeats: int
) -> Row:
    """Milliseconds per engine, including token readback, and the best one's share of the roofline."""
    runs = {name: _runs(engine, shape) for name, engine in engines.items()}

    def step(name: str) -> object:
        return greedy_tokens(engines[name].forward(runs[name])).tolist()

    device = next(iter(engines.values())).device
    actions = {name: (lambda name=name: step(name)) for name in engines}
    seconds = interleaved(actions, device, repeats=repeats)
    tokens = shape.requests * shape.tokens
    work = work_of_step(
        decoder.config,
        decoder.packed_bytes,
        tokens=tokens,
        logit_rows=tokens,
        context_tokens=shape.requests * (shape.context + shape.tokens),
        item=decoder.embed_tokens.weight.element_size(),
    )
    best = min(seconds.values())
    return {
        "requests": shape.requests,
        "tokens_per_request": shape.tokens,
        "context": shape.context,
        **{f"{name}_ms": 1000 * value for name, value in seconds.items()},
        "floor_ms": 1000 * work.floor_seconds(machine),
        "roofline_share": work.floor_seconds(machine) / best,
        "gigabytes_per_second": (work.weight_bytes + work.cache_bytes) / best / 1e9,
        "teraflops": work.operations / best / 1e12,
    }


def draft_row(
    engines: dict[str, ContextDraftEngine],
    requests: int,
    context: int,
    sampling: SamplingParams,
    *,
    repeats: int,
) -> Row:
    """Milliseconds of a draft pass, including the features of 3 newly committed tokens per request."""
    device = next(iter(engines.values())).device
    at = dict.fromkeys(engines, context)
    for engine in engines.values():
        engine.propose(_items(engine, requests, 0, context, sampling))

    def propose(name: str) -> object:
        start, at[name] = at[name], at[name] + 3
        return engines[name].propose(_items(engines[name], requests, start, at[name], sampling))

    actions = {name: (lambda name=name: propose(name)) for name in engines}
    seconds = interleaved(actions, device, repeats=repeats)
    for engine in engines.values():
        engine.release([str(index) for index in range(requests)])
    return {
        "requests": requests,
        "context": context,
        "greedy": sampling.greedy,
        **{f"{name}_ms": 1000 * value for name, value in seconds.items()},
    }


def _items(
    engine: ContextDraftEngine, requests: int, start: int, end: int, sampling: SamplingParams
) -> list[DraftItem]:
    features = torch.zeros((end - start, engine.geometry.feature_size), device=engine.device)
    return [
        DraftItem(
            sequence_id=str(index),
            anchor_token_id=1,
            anchor_position=end,
            features_start=start,
            features=features,
            token_ids=(0,) * (end - start),
            sampling=sampling,
            verification=Verification.REJECTION,
        )
        for index in range(requests)
    ]


def _runs(engine: TargetEngine, shape: Shape) -> Sequence[Run]:
    """Each request reads its own pages."""
    each = -(-(shape.context + shape.tokens) // engine.page_tokens)
    return [
        Run(
            [1] * shape.tokens,
            shape.context,
            range(1 + index * each, 1 + (index + 1) * each),
            shape.tokens,
        )
        for index in range(shape.requests)
    ]


def kv_tokens(shapes: Sequence[Shape], page_tokens: int) -> int:
    """Positions in the pages of the largest shape."""
    return max(s.requests * -(-(s.context + s.tokens) // page_tokens) * page_tokens for s in shapes)
