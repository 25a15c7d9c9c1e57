"""Measurements over a window of time under load: tokens per second, and each verifier's share."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.failover_parts.clients import Load
from benchmarks.failover_parts.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    tokens_per_second: float
    requests: tuple[float, ...]
    """Requests sent to each verifier."""
    verify_lengths: tuple[float, ...]
    """Mean draft tokens verified per request and round, at each verifier."""
    scheduler_plans: float
    """Share of rounds that were planned with the scheduler's capacity."""
    processor_share: dict[str, float]
    """CPU use by process, in cores."""

    @property
    def busiest(self) -> int:
        return self.requests.index(max(self.requests))

    def request_share(self, verifier: int) -> float:
        total = sum(self.requests)
        return self.requests[verifier] / total if total else 0.0


async def watch(cluster: Cluster, load: Load, seconds: float) -> Window:
    counts, used = await cluster.counts(), cluster.processor_seconds()
    rate = await load.tokens_per_second(seconds)
    now_used = cluster.processor_seconds()
    changes = [now.since(then) for now, then in zip(await cluster.counts(), counts, strict=True)]
    plans = sum(change.plans for change in changes)
    return Window(
        tokens_per_second=rate,
        requests=tuple(change.requests for change in changes),
        verify_lengths=tuple(change.verify_length for change in changes),
        scheduler_plans=sum(change.scheduler_plans for change in changes) / plans if plans else 0.0,
        processor_share={role: (now_used[role] - then) / seconds for role, then in used.items()},
    )
