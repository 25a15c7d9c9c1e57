"""Judges whether a soak test's samples grow. Pure functions of samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.soak_parts.process import Sample

WARM_SHARE = 0.25
"""Share of initial samples to ignore, while caches and the allocator's arenas fill."""
MIN_JUDGED = 4
KV_EPSILON = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Allowed growth from the first to the last third of the samples after warm-up."""

    rss_mb: float = 24.0
    open_files: float = 2.0
    tasks: float = 2.0
    threads: float = 1.0
    objects: float = 20_000.0
    """Some bounded histories fill up for hours: the policy of which requests to draft for keeps three objects
    for each of the last 4,096 requests."""


@dataclass(frozen=True, slots=True)
class Growth:
    name: str
    first: float
    last: float
    bound: float

    @property
    def held(self) -> bool:
        return self.last - self.first <= self.bound


def growth(samples: Sequence[Sample], bounds: Bounds) -> tuple[Growth, ...]:
    """Medians of the first and the last third after warm-up. Raises ValueError for too few samples."""
    judged = samples[int(WARM_SHARE * len(samples)) :]
    if len(judged) < MIN_JUDGED:
        raise ValueError(f"{len(judged)} samples after warm-up; growth needs {MIN_JUDGED} or more")
    third = max(1, len(judged) // 3)
    reads: tuple[tuple[str, Callable[[Sample], float], float], ...] = (
        ("resident MB", lambda s: s.rss_mb, bounds.rss_mb),
        ("open files", lambda s: s.open_files, bounds.open_files),
        ("asyncio tasks", lambda s: s.tasks, bounds.tasks),
        ("threads", lambda s: s.threads, bounds.threads),
        ("Python objects", lambda s: s.objects, bounds.objects),
    )
    return tuple(
        Growth(
            name,
            statistics.median(map(read, judged[:third])),
            statistics.median(map(read, judged[-third:])),
            bound,
        )
        for name, read, bound in reads
    )


def held_pages(samples: Sequence[Sample]) -> list[float]:
    """Minutes at which KV pages were in use although the process was idle."""
    return [sample.minute for sample in samples if sample.free_kv_fraction < 1.0 - KV_EPSILON]
