"""The requests that share the rounds of a verifier: all decoding ones, or one of two cohorts that take turns.

Like the engine's `DraftTurns`, it requests drafts when a cohort's round ends and waits for them when its next
round begins. One simplification: a request that changes cohorts may sit out a round, whereas the engine
includes it without a draft.
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
    """The drafts requested for a cohort's next round, one entry per request."""

    rows: Ints
    """Recorded row that each request is at."""
    most: Ints
    """Maximum number of draft tokens that each could use."""
    lookups: Floats | None
    drafted: Bools | None
    """Which requests the drafter drafts for; None: none."""
    at: float
    seconds: float
    """From `at` until the drafts arrive: network, the drafter's queue, drafting."""

    def wait(self, now: float) -> float:
        return max(self.seconds - (now - self.at), 0.0)


@dataclass(slots=True)
class Cohort:
    planner: RoundPlanner
    active: Decoding
    committed: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Tokens the newest round commits for each of `active`."""
    asked: Asked | None = None
    """Drafts for the next round; the requests stay the same until then."""
    coming: list[Ints] = field(default_factory=list)
    """Requests from the other cohort that join after the next round."""

    @property
    def size(self) -> int:
        return len(self.active) + sum(len(columns[0]) for columns in self.coming)

    def receive(self) -> None:
        """Let the requests in `coming` join; call once the round is over."""
        for columns in self.coming:
            self.active.put(columns)
        self.coming.clear()


def new_cohorts(
    count: int, factory: PlannerFactory, round_time: RoundTimeModel, people: Population
) -> tuple[Cohort, ...]:
    """The cohorts of one verifier. Served planners share one plan source; other planners stay independent."""
    first = factory(round_time)
    others = (first.partner() if isinstance(first, Served) else factory(round_time) for _ in range(1, count))
    return tuple(Cohort(planner, Decoding(people)) for planner in (first, *others))


def even_out(fuller: Cohort, other: Cohort) -> None:
    """Move the newest requests of `fuller` to `other` until their sizes differ by at most one.

    Call when the round of `fuller` has ended and its next drafts are not requested yet.
    """
    surplus = (fuller.size - other.size) // 2
    if surplus <= 0:
        return
    columns = fuller.active.take_last(surplus)
    if other.asked is None:
        other.active.put(columns)
    else:
        other.coming.append(columns)
