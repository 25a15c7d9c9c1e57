"""Measures the step-rate curve of a target engine at start: seconds per pass by batch tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.engine.batch import Run
from dspark_core.engine.target_engine import TargetEngine

DEFAULT_BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64)


def profile_step_rate(
    engine: TargetEngine,
    *,
    batch_tokens: Sequence[int] = DEFAULT_BATCH_TOKENS,
    tokens_per_request: int = 8,
    context_tokens: int = 128,
    repeats: int = 4,
) -> StepRateCurve:
    """Times passes shaped like verification: requests of up to `tokens_per_request` tokens each.

    Writes into arbitrary pages, so it must run before the engine serves. The batch tokens are
    interleaved over the repeats and the fastest taken: what else runs on the machine only ever
    adds time, and a curve bent by it would stop speculation for no reason.
    """
    context = min(context_tokens, engine.max_context_tokens - tokens_per_request)
    passes = {
        tokens: _runs(engine, tokens, tokens_per_request, context)
        for tokens in batch_tokens
        if tokens <= engine.max_context_tokens
    }
    for runs in passes.values():
        engine.forward(runs)  # first calls pay for allocation and kernel selection
    seconds: dict[int, list[float]] = {tokens: [] for tokens in passes}
    for _ in range(repeats):
        for tokens, runs in passes.items():
            started = time.perf_counter()
            engine.forward(runs)
            seconds[tokens].append(time.perf_counter() - started)
    curve = StepRateCurve(tuple(seconds), tuple(min(times) for times in seconds.values()))
    return curve.monotone()


def _runs(engine: TargetEngine, tokens: int, per_request: int, context: int) -> list[Run]:
    pages = -(-(context + per_request) // engine.page_tokens)
    table = [1 + index % (engine.num_pages - 1) for index in range(pages)]
    counts = [per_request] * (tokens // per_request)
    if tokens % per_request:
        counts.append(tokens % per_request)
    # Requests share pages: what is computed does not matter, only how long it takes.
    return [Run([0] * count, context, table, count) for count in counts]
