"""Measures how long a draft source takes for a block of 1, 2, 4, ... sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from dspark_core.algorithms.round_time import DraftTimeModel
from dspark_core.algorithms.step_time import lower_quartile, monotone
from dspark_core.engine.protocols import DraftItem, DraftSource
from dspark_core.records import SamplingParams, Verification

DEFAULT_REQUESTS = (1, 2, 4, 8, 16, 32)
NEW_FEATURES = 3
"""Positions committed between two drafts of a sequence: about the accepted length."""


def profile_draft_time(
    source: DraftSource,
    requests: Sequence[int] = DEFAULT_REQUESTS,
    *,
    dtype: torch.dtype = torch.float32,
    context_tokens: int = 64,
    repeats: int = 9,
    budget_seconds: float = 3.0,
    deadline_seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> DraftTimeModel:
    """What a verifier waits, the way to the drafter included: lower quartiles, since what disturbs a pass
    only adds to it.

    Counts that no longer fit the budget are left out. Raises what `propose` fails with.
    """
    started = clock()
    counts: list[int] = []
    typical: list[float] = []
    for count in requests:
        # One priming and all repeats, if time grows as the count does.
        expected = (1 + repeats) * typical[-1] * count / counts[-1] if counts else 0.0
        if expected > budget_seconds - (clock() - started):
            break
        counts.append(count)
        typical.append(_typical(source, count, dtype, context_tokens, repeats, deadline_seconds, clock))
    return DraftTimeModel(tuple(counts), monotone(typical))


def _typical(
    source: DraftSource,
    count: int,
    dtype: torch.dtype,
    context_tokens: int,
    repeats: int,
    deadline_seconds: float,
    clock: Callable[[], float],
) -> float:
    names = [f"profile-{count}-{index}" for index in range(count)]
    times = []
    try:
        _propose(source, names, 0, context_tokens, dtype, deadline_seconds)  # primes the contexts
        for repeat in range(repeats):
            start = context_tokens + repeat * NEW_FEATURES
            started = clock()
            _propose(source, names, start, start + NEW_FEATURES, dtype, deadline_seconds)
            times.append(clock() - started)
    finally:
        source.release(names)
    return lower_quartile(times)


def _propose(
    source: DraftSource, names: Sequence[str], start: int, anchor: int, dtype: torch.dtype, deadline: float
) -> None:
    size = source.geometry.feature_size
    items = [
        DraftItem(
            sequence_id=name,
            anchor_token_id=0,
            anchor_position=anchor,
            features_start=start,
            features=torch.zeros((anchor - start, size), dtype=dtype),
            token_ids=(0,) * (anchor - start),
            sampling=SamplingParams(temperature=0.0),
            verification=Verification.REJECTION,
        )
        for name in names
    ]
    source.propose(items).result(timeout=deadline)
