"""The planners of replay and simulation by name."""

from __future__ import annotations

from collections.abc import Callable

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.errors import ConfigError
from dspark_core.simulation.cluster_planner import Pool
from dspark_core.simulation.planners import (
    Algorithm1,
    Delayed,
    FixedLength,
    FreeSearch,
    NoSpeculation,
    RoundPlanner,
    Served,
    Threshold,
)

PlannerFactory = Callable[[RoundTimeModel], RoundPlanner]

NAMES = (
    "none",
    "mtp1",
    "fixed:N",
    "threshold:P",
    "algorithm1",
    "delayed",
    "coupled",
    "dspark",
    "cluster",
    "cluster:unpriced",
)


def planner_factory(name: str, drafters: int = 0, *, cohorts: int = 1) -> PlannerFactory:
    """Factory of the planners of one cluster; call it once per verifier, in order.

    `drafters`: how many the verifiers share; 0: each has its own. Raises ConfigError for an unknown name,
    a bad number in it, or a planner that does not support `cohorts`.
    """
    kind, _, argument = name.partition(":")
    match kind:
        case "none":
            return lambda _: NoSpeculation()
        case "mtp1":
            return lambda _: FixedLength(1)
        case "fixed":
            length = _whole(argument, name)
            return lambda _: FixedLength(length)
        case "threshold":
            threshold = _share(argument, name)
            return lambda _: Threshold(threshold)
        case "algorithm1":
            return lambda _: Algorithm1()
        case "delayed":
            return lambda _: Delayed()
        case "coupled":
            return lambda _: FreeSearch()
        case "dspark":
            return Served
        case "cluster":
            if argument not in ("", "unpriced"):
                raise ConfigError(f"planner {name!r}: only cluster:unpriced may follow the colon")
            if cohorts > 1:
                raise ConfigError(f"planner {name!r} knows no turns: with cohorts {cohorts} take dspark")
            return Pool(drafters, priced=not argument)
        case _:
            raise ConfigError(f"unknown planner {name!r}; known: {', '.join(NAMES)}")


def _whole(text: str, name: str) -> int:
    length = int(text) if text.isdecimal() else 0
    if length < 1:  # for length 0 there is `none`, which also saves the drafting
        raise ConfigError(f"planner {name!r} needs a whole number >= 1 behind the colon, as in fixed:4")
    return length


def _share(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"planner {name!r} needs a share in [0, 1] behind the colon, as in threshold:0.5")
    return value
