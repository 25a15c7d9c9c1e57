"""The requests that share the rounds of a verifier: all that decode, or one of two cohorts that take turns.

As `DraftTurns` of the engine: drafts are asked for when a cohort's round ends, awaited when its next begins.
One thing is simpler: who changes cohorts sits out a round, where the engine takes it along without a draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats
from dspark_core.simulation.decoding import Decoding
from dspark_core.simulation.planner_names import PlannerFactory
from dspark_core.simulation.planners import RoundPlanner, Served
from dspark_core.simulation.population import Population


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a round of some requests is drafted from, one entry per request."""

    rows: Ints
    """The recorded rows that they go through."""
    most: Ints
    """Draft tokens that each could use."""
    lookups: Floats | None
    drafted: Bools | None
    """Who is drafted for; None: nobody."""
    at: float
    seconds: float
    """From `at` until the drafts are there: network, the drafter's queue, drafting."""

    def wait(self, now: float) -> float:
        return max(self.seconds - (now - self.at), 0.0)


@dataclass(slots=True)
class Cohort:
    planner: RoundPlanner
    active: Decoding
    committed: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """By its newest round, for each of `active`."""
    asked: Asked | None = None
    """For its next round; the requests stay the same until then."""
    coming: list[Ints] = field(default_factory=list)
    """Requests of the other cohort, that join when the next round is over."""

    @property
    def size(self) -> int:
        return len(self.active) + sum(len(columns[0]) for columns in self.coming)

    def receive(self) -> None:
        """Those that were to come, once the round is over."""
        for columns in self.coming:
            self.active.put(columns)
        self.coming.clear()


def new_cohorts(
    count: int, factory: PlannerFactory, round_time: RoundTimeModel, people: Population
) -> tuple[Cohort, ...]:
    """Of one verifier. What serves knows all of them; the other planners have nothing to tell each other."""
    first = factory(round_time)
    others = (first.partner() if isinstance(first, Served) else factory(round_time) for _ in range(1, count))
    return tuple(Cohort(planner, Decoding(people)) for planner in (first, *others))


def even_out(fuller: Cohort, other: Cohort) -> None:
    """The latest of the one whose round is over, for whom nothing is asked yet, go to the other while that is
    smaller by two or more."""
    surplus = (fuller.size - other.size) // 2
    if surplus <= 0:
        return
    columns = fuller.active.take_last(surplus)
    if other.asked is None:
        other.active.put(columns)
    else:
        other.coming.append(columns)
