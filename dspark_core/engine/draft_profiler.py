"""Measures how long a draft source takes for a block of 1, 2, 4, ... sequences.

As in rounds: a target pass goes before each draft, as its weights push the drafter's out of the
processor's cache, and features are read from the engine. Drafts one after the other looked a third shorter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dspark_core.algorithms.round_time import DraftTimeModel
from dspark_core.algorithms.step_time import lower_quartile, monotone
from dspark_core.engine.batch import Run
from dspark_core.engine.profile_passes import Passes, ProfilePasses
from dspark_core.engine.protocols import DraftItem, DraftSource
from dspark_core.engine.target_engine import FeatureSpan
from dspark_core.records import SamplingParams, Verification

DEFAULT_REQUESTS = (1, 2, 4, 8, 16, 32)
NEW_FEATURES = 3
"""Positions committed between two drafts of a sequence: about the accepted length."""


DEADLINE_SECONDS = 10.0
"""Of one draft."""


class FeatureEngine(Passes, Protocol):
    """What a profile of drafts needs of a target engine."""

    def read_features_of(self, spans: Sequence[FeatureSpan]) -> list[Tensor]: ...


def profile_draft_time(
    source: DraftSource,
    engine: FeatureEngine,
    requests: Sequence[int] = DEFAULT_REQUESTS,
    *,
    context_tokens: int = 64,
    repeats: int = 9,
    budget_seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> DraftTimeModel:
    """What a verifier waits, the way to the drafter included: lower quartiles, since what disturbs a pass
    only adds to it. Reads arbitrary pages of the engine, and writes them.

    Counts that no longer fit the budget are left out. Raises what `propose` fails with.
    """
    started = clock()
    counts: list[int] = []
    typical: list[float] = []
    spent = 0.0
    for count in requests:
        # If time grows as the count does.
        expected = spent * count / counts[-1] if counts else 0.0
        began = clock()
        if expected > budget_seconds - (began - started):
            break
        counts.append(count)
        drafts = _ProfiledDrafts(source, engine, count, context_tokens)
        typical.append(lower_quartile(drafts.times(repeats, clock)))
        spent = clock() - began
    return DraftTimeModel(tuple(counts), monotone(typical))


class _ProfiledDrafts:
    """Of so many sequences at once."""

    def __init__(self, source: DraftSource, engine: FeatureEngine, count: int, context_tokens: int) -> None:
        self._source, self._engine = source, engine
        self._context_tokens = context_tokens
        self._passes = ProfilePasses(engine)
        self._names = [f"profile-{count}-{index}" for index in range(count)]

    def times(self, repeats: int, clock: Callable[[], float]) -> list[float]:
        """Of drafts that continue a context."""
        times = []
        try:
            self._propose(self._runs(self._context_tokens), 0, self._context_tokens)
            for repeat in range(repeats):
                start = self._context_tokens + repeat * NEW_FEATURES
                runs = self._runs(start + NEW_FEATURES)
                self._passes.verify(runs)
                started = clock()
                self._propose(runs, start, start + NEW_FEATURES)
                times.append(clock() - started)
        finally:
            self._source.release(self._names)
        return times

    def _runs(self, context: int) -> list[Run]:
        return self._passes.runs(len(self._names), len(self._names), context)

    def _propose(self, runs: Sequence[Run], start: int, anchor: int) -> None:
        features = self._engine.read_features_of([(run.pages, start, anchor) for run in runs])
        items = [
            DraftItem(
                sequence_id=name,
                anchor_token_id=0,
                anchor_position=anchor,
                features_start=start,
                features=rows,
                token_ids=(0,) * (anchor - start),
                sampling=SamplingParams(temperature=0.0),
                verification=Verification.REJECTION,
            )
            for name, rows in zip(self._names, features, strict=True)
        ]
        self._source.propose(items).result(timeout=DEADLINE_SECONDS)
