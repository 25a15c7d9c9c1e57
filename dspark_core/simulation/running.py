"""Runs scenarios: one per planner, a frontier over loads, the smallest pools that keep a promise."""

from __future__ import annotations

import dataclasses
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
"""Of the requests with a floor: what a pool that is large enough may break."""
MAX_FIRST_TOKEN_SECONDS = 2.0
"""95 % of the requests must have begun by then."""
MAX_DRAFT_QUEUE_SHARE = 0.1
"""Of the wait for drafts: what may be spent behind other verifiers."""
SIZING_REQUESTS_PER_SLOT = 8


@dataclass(frozen=True, slots=True)
class World:
    """What does not change between runs."""

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
    """Closed loop at several loads: tokens per second of all against those of a user."""
    found: dict[str, tuple[FrontierPoint, ...]] = {}
    for planner in planners:
        points = []
        for users in users_per_verifier:
            loaded = dataclasses.replace(
                scenario,
                users=users * scenario.verifiers,
                arrivals_per_second=0.0,
                max_running=max(users, scenario.max_running),
                requests=max(scenario.requests, SIZING_REQUESTS_PER_SLOT * users * scenario.verifiers),
            )
            points.append(FrontierPoint(users_per_verifier=users, summary=simulate(world, loaded, planner)))
            on_point()
        found[planner] = tuple(points)
    return found


def size_pools(
    world: World, scenario: Scenario, planner: str, on_try: Callable[[int, int], None] = lambda *_: None
) -> PoolSize:
    """The fewest verifiers that keep the floors and answer soon, then the fewest drafters for those.

    For open arrivals. Raises ConfigError when 4096 verifiers are not enough.
    """
    if not scenario.arrivals_per_second:
        raise ConfigError("sizing needs arrivals_per_second: users of a closed loop wait as long as it takes")

    def tried(verifiers: int, drafters: int) -> Summary:
        on_try(verifiers, drafters)
        return simulate(world, dataclasses.replace(scenario, verifiers=verifiers, drafters=drafters), planner)

    verifiers = _fewest(lambda count: _keeps_promises(tried(count, 0)), 4096)
    if verifiers is None:
        raise ConfigError(
            f"4096 verifiers do not keep the promises at {scenario.arrivals_per_second:g} arrivals per second"
        )
    drafters = _fewest(lambda count: _drafts_in_time(tried(verifiers, count)), verifiers) or verifiers
    return PoolSize(verifiers=verifiers, drafters=drafters, summary=tried(verifiers, drafters))


def _keeps_promises(summary: Summary) -> bool:
    broken = summary.floors_broken / max(summary.promised, 1)
    return broken <= MAX_BROKEN_SHARE and summary.time_to_first_token[2] <= MAX_FIRST_TOKEN_SECONDS


def _drafts_in_time(summary: Summary) -> bool:
    return _keeps_promises(summary) and summary.draft_queue_share <= MAX_DRAFT_QUEUE_SHARE


def _fewest(enough: Callable[[int], bool], limit: int) -> int | None:
    """The smallest count up to `limit` for which `enough` holds, which it does for all beyond it."""
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
