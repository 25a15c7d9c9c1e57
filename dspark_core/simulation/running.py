"""Runs scenarios: a single simulation, a frontier over loads, and the smallest pools that keep the SLA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.errors import ConfigError
from dspark_core.simulation.cluster import Cluster
from dspark_core.simulation.domains import DomainRounds
from dspark_core.simulation.planner_names import planner_factory
from dspark_core.simulation.population import draw_population
from dspark_core.simulation.records import Summary
from dspark_core.simulation.scenario import Scenario

MTP1 = "mtp1"
MAX_BROKEN_SHARE = 0.05
"""Share of the requests with a floor that a large enough pool may break."""
MAX_FIRST_TOKEN_SECONDS = 2.0
"""Limit on the 95th percentile of the time to first token."""
MAX_DRAFT_QUEUE_SHARE = 0.1
"""Limit on the share of the wait for drafts that is spent queueing behind other verifiers."""
MAX_LOAD = 0.95
"""Limit on arriving tokens per second, as a share of what full verifiers produce."""
SIZING_REQUESTS_PER_SLOT = 8
SIZING_SECONDS = 60.0
"""Minimum length of the simulated arrivals."""


@dataclass(frozen=True, slots=True)
class World:
    """Inputs shared by all runs."""

    recorded: DomainRounds
    round_time: RoundTimeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    users_per_verifier: int
    summary: Summary

    @property
    def user_speed(self) -> float:
        """Median tokens per second of a user."""
        return self.summary.user_speed[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    verifiers: int
    drafters: int
    summary: Summary


def simulate(
    world: World, scenario: Scenario, planner: str, on_ended: Callable[[int], None] = lambda _: None
) -> Summary:
    """Raises ConfigError for an unknown planner or domain."""
    factory = planner_factory(planner, scenario.drafters, cohorts=scenario.cohorts)
    population = draw_population(scenario, world.recorded)
    cluster = Cluster(scenario, world.recorded, population, world.round_time, factory, mtp1=planner == MTP1)
    return cluster.run(on_ended).summary(planner)


def frontier(
    world: World,
    scenario: Scenario,
    planners: Sequence[str],
    users_per_verifier: Sequence[int],
    on_point: Callable[[], None] = lambda: None,
) -> dict[str, tuple[FrontierPoint, ...]]:
    """Closed loop at several loads: total tokens per second against tokens per second per user."""
    found: dict[str, tuple[FrontierPoint, ...]] = {}
    for planner in planners:
        points = []
        for users in users_per_verifier:
            summary = simulate(world, _with_users(scenario, users), planner)
            points.append(FrontierPoint(users_per_verifier=users, summary=summary))
            on_point()
        found[planner] = tuple(points)
    return found


def size_pools(
    world: World, scenario: Scenario, planner: str, on_try: Callable[[int, int], None] = lambda *_: None
) -> PoolSize:
    """The fewest verifiers that keep floors and time to first token, then the fewest drafters for those.

    Needs open-loop arrivals. Raises ConfigError without them, or when 4096 verifiers are not enough.
    """
    if not scenario.arrivals_per_second:
        raise ConfigError("sizing needs arrivals_per_second: users of a closed loop wait as long as it takes")

    def serves(sized: Scenario, draft_queue_share: float) -> bool:
        on_try(sized.verifiers, sized.drafters)
        summary = simulate(world, sized, planner)
        if not _keeps_promises(summary) or summary.draft_queue_share > draft_queue_share:
            return False
        # A slowly growing queue would pass the check above, so also require spare capacity.
        full = simulate(world, _with_users(sized, sized.max_running), planner)
        arriving = sized.arrivals_per_second * summary.tokens / summary.requests
        return arriving <= MAX_LOAD * full.steady_tokens_per_second

    verifiers = _fewest(lambda count: serves(_sized(scenario, count, 0), 1.0), 4096)
    if verifiers is None:
        raise ConfigError(
            f"4096 verifiers do not keep the promises at {scenario.arrivals_per_second:g} arrivals per second"
        )
    drafters = (
        _fewest(lambda count: serves(_sized(scenario, verifiers, count), MAX_DRAFT_QUEUE_SHARE), verifiers)
        or verifiers
    )
    on_try(verifiers, drafters)
    summary = simulate(world, _sized(scenario, verifiers, drafters), planner)
    return PoolSize(verifiers=verifiers, drafters=drafters, summary=summary)


def _with_users(scenario: Scenario, users: int) -> Scenario:
    """Closed loop of `users` per verifier, with enough requests to measure their speed."""
    return dataclasses.replace(
        scenario,
        users=users * scenario.verifiers,
        arrivals_per_second=0.0,
        max_running=max(users, scenario.max_running),
        requests=max(scenario.requests, SIZING_REQUESTS_PER_SLOT * users * scenario.verifiers),
    )


def _sized(scenario: Scenario, verifiers: int, drafters: int) -> Scenario:
    """With these pools, and enough requests to overflow them several times if they are too small."""
    slots = verifiers * scenario.max_running
    arriving = math.ceil(SIZING_SECONDS * scenario.arrivals_per_second)
    requests = max(scenario.requests, arriving, SIZING_REQUESTS_PER_SLOT * slots)
    return dataclasses.replace(scenario, verifiers=verifiers, drafters=drafters, requests=requests)


def _keeps_promises(summary: Summary) -> bool:
    broken = summary.floors_broken / max(summary.promised, 1)
    return broken <= MAX_BROKEN_SHARE and summary.time_to_first_token[2] <= MAX_FIRST_TOKEN_SECONDS


def _fewest(enough: Callable[[int], bool], limit: int) -> int | None:
    """The smallest count up to `limit` for which `enough` holds; `enough` must be monotonic."""
    high = 1
    while not enough(high):
        if high >= limit:
            return None
        high = min(2 * high, limit)
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
