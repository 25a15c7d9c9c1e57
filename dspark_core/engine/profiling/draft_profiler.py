"""Measures how long a draft source takes to draft for 1, 2, 4, ... sequences.

As in serving, each draft follows a target pass, whose weights displace the drafter's from the processor's
cache, and features are read from the engine. Drafting back to back looked a third faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dspark_core.algorithms.round_time import DraftTimeModel
from dspark_core.algorithms.step_time import lower_quartile, monotone
from dspark_core.engine.profiling.profile_passes import Passes, ProfilePasses
from dspark_core.engine.protocols import DraftItem, DraftSource
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import FeatureSpan
from dspark_core.records import SamplingParams, Verification

DEFAULT_REQUESTS = (1, 2, 4, 8, 16, 32)
NEW_FEATURES = 3
"""Positions committed between two drafts of a sequence: about the accepted length."""


DEADLINE_SECONDS = 10.0
"""Per draft."""


class FeatureEngine(Passes, Protocol):
    """The target engine's methods that profiling of drafts needs."""

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
    """Measures what a verifier waits for drafts, transport included. Takes lower quartiles, since
    disturbances only add time. Reads and writes arbitrary pages of the engine.

    Counts that no longer fit the budget are left out. Raises whatever `propose` fails with.
    """
    started = clock()
    counts: list[int] = []
    typical: list[float] = []
    spent = 0.0
    for count in requests:
        # Assuming that time grows in proportion to the count.
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
    """Drafts for `count` sequences at once."""

    def __init__(self, source: DraftSource, engine: FeatureEngine, count: int, context_tokens: int) -> None:
        self._source, self._engine = source, engine
        self._context_tokens = context_tokens
        self._passes = ProfilePasses(engine)
        self._names = [f"profile-{count}-{index}" for index in range(count)]

    def times(self, repeats: int, clock: Callable[[], float]) -> list[float]:
        """Seconds of drafts that continue a context."""
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
