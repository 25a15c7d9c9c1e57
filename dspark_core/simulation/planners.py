"""Planners over arrays of one round, used by both replay and simulation.

Thin adapters: verify lengths come from the production functions in `dspark_core.algorithms`, and `dspark`
is the verifier's own plan source. Each verifier needs its own planner, because some remember rounds.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from dspark_core.algorithms import delayed_scheduler
from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, rank
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.prefix_scheduler import admit_while_rising
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats
from dspark_core.engine.drafts.draft_turns import ALL, DECISION_ROUNDS, IN_TURNS
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.records import DraftOrigin, RequestSurvival, RoundReport

REFRESH_ROUNDS = 4
"""Rounds between recomputations of the capacity and of the choice of requests to draft for."""


@dataclass(frozen=True, slots=True)
class RoundView:
    """Requests that decode in the round about to be drafted, one entry each."""

    ids: Ints
    context_tokens: Ints
    floors: Floats
    """Tokens per second; 0: none."""
    draftable: Bools
    """Whether the drafter has a draft that could be used: at least two answer tokens are left."""
    looked_up: Floats | None = None
    """Survival of looked-up tokens [requests, longest], negative where there are none; used by requests that
    are not drafted for. None: lookup is off."""


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    lengths: Ints
    accepted: Ints
    batch_tokens: int
    context_tokens: int
    draft_seconds: float
    step_seconds: float
    loop_seconds: float = 0.0


class RoundPlanner(Protocol):
    """Called once per round, in this order: `drafted`, `plan`, `learn`."""

    looks_up: ClassVar[bool]
    """Whether requests that are not drafted for use lookup."""

    def drafted(self, view: RoundView) -> Bools | None:
        """Which requests to draft for this round [requests]; None: all."""
        ...

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        """Verify lengths [requests]; `seconds[n]`: time of this round with n draft tokens verified."""
        ...

    def learn(self, outcome: RoundOutcome) -> None: ...


class _Forgetful:
    """Drafts for all requests and learns nothing."""

    looks_up: ClassVar[bool] = False

    def drafted(self, view: RoundView) -> Bools | None:
        return None

    def learn(self, outcome: RoundOutcome) -> None:
        """Nothing to learn."""


class NoSpeculation(_Forgetful):
    def drafted(self, view: RoundView) -> Bools | None:
        return np.zeros(len(view.ids), dtype=np.bool_)

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        return np.zeros(batch.requests, dtype=np.int64)


class FixedLength(_Forgetful):
    def __init__(self, length: int) -> None:
        self._length = length

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        present: Ints = (batch.survival >= 0.0).sum(axis=1)
        return np.minimum(present, self._length)


class Threshold(_Forgetful):
    """Verifies while survival is at least the threshold."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        lengths: Ints = (batch.survival >= self._threshold).sum(axis=1)
        return lengths


class Algorithm1(_Forgetful):
    """The paper's Algorithm 1, early stopping included."""

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        ranking = rank(batch)
        count = admit_while_rising(ranking, float(batch.requests), seconds)
        return ranking.lengths(count)


class FreeSearch(_Forgetful):
    """The search over the whole round used with coupled verification; biased under rejection sampling."""

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        return search(batch, seconds)


class Delayed(_Forgetful):
    """Spends a capacity computed from earlier rounds on this round's best tokens (section 5.2).

    Speed floors are served first. Until a round is old enough it follows Algorithm 1, as a verifier
    does.
    """

    def __init__(self) -> None:
        self._young: deque[int | None] = deque(maxlen=delayed_scheduler.MIN_PLAN_AGE_ROUNDS)
        self._capacity: int | None = None
        self._round = 0

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        if not np.count_nonzero(batch.survival[:, :1] >= 0.0):
            return np.zeros(batch.requests, dtype=np.int64)  # nothing to learn from this round
        usable = self._young[0] if len(self._young) == delayed_scheduler.MIN_PLAN_AGE_ROUNDS else None
        ranking = rank(batch)
        if usable is None:
            lengths = ranking.lengths(admit_while_rising(ranking, float(batch.requests), seconds))
        else:
            lengths = delayed_scheduler.spend(batch, usable, seconds, ranking)
        # The lengths are settled; what follows affects only later rounds.
        if self._round % REFRESH_ROUNDS == 0 or self._capacity is None:
            self._capacity = delayed_scheduler.capacity(batch, seconds, ranking)
        self._young.append(self._capacity)
        self._round += 1
        return lengths


class Served:
    """The verifier's own plan source, including its policy of which requests to draft for."""

    looks_up: ClassVar[bool] = True

    def __init__(self, round_time: RoundTimeModel) -> None:
        self._source = LocalPlanSource(round_time)
        self._partner: Served | None = None
        self._candidates: list[DraftCandidate] = []
        self._ids: list[str] = []
        self._origins: list[DraftOrigin] = []
        self._survival: list[tuple[float, ...]] = []
        self._rounds = 0

    def partner(self) -> Served:
        """Planner of the verifier's other cohort; both share one plan source."""
        other = copy.copy(self)
        self._partner, other._partner = other, self
        return other

    def drafted(self, view: RoundView) -> Bools | None:
        self._ids = [str(one) for one in view.ids.tolist()]
        self._candidates = [
            DraftCandidate(
                sequence_id=name,
                draftable=bool(draftable),
                floor_tokens_per_second=float(floor) or None,
                context_tokens=int(context),
                lookup_survival=lookup,
            )
            for name, draftable, floor, context, lookup in zip(
                self._ids, view.draftable, view.floors, view.context_tokens, _tuples(view), strict=True
            )
        ]
        if self._partner is not None and self._rounds % DECISION_ROUNDS == 0:
            everybody = [*self._candidates, *self._partner._candidates]
            self._source.cohorts(everybody, IN_TURNS if len(everybody) >= IN_TURNS else ALL)
        wanted = self._source.wants_draft(self._candidates)
        self._origins = [DraftOrigin.DRAFTER if one else DraftOrigin.LOOKUP for one in wanted]
        return np.array(wanted, dtype=np.bool_)

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        self._survival = [tuple(row[row >= 0.0].tolist()) for row in batch.survival]
        share = batch.context_tokens // max(batch.requests, 1)
        requests = [
            PlanRequest(
                sequence_id=name,
                survival=survival,
                floor_tokens_per_second=float(floor) or None,
                context_tokens=share,
                coupled=bool(coupled),
                granted=float(granted),
                origin=origin,
            )
            for name, survival, floor, coupled, granted, origin in zip(
                self._ids,
                self._survival,
                batch.floors,
                batch.coupled,
                batch.granted,
                self._origins,
                strict=True,
            )
        ]
        return np.array(self._source.plan(requests), dtype=np.int64)

    def learn(self, outcome: RoundOutcome) -> None:
        self._rounds += 1
        rows = zip(self._ids, self._survival, outcome.lengths, outcome.accepted, self._origins, strict=True)
        self._source.report(
            RoundReport(
                replica_id="simulated",
                round=self._rounds,
                requests=tuple(
                    RequestSurvival(
                        sequence_id=name,
                        survival=survival,
                        verify_length=int(length),
                        accepted=int(accepted),
                        origin=origin,
                    )
                    for name, survival, length, accepted, origin in rows
                ),
                batch_tokens=outcome.batch_tokens,
                context_tokens=outcome.context_tokens,
                step_seconds=outcome.step_seconds,
                draft_seconds=outcome.draft_seconds,
                loop_seconds=outcome.loop_seconds,
            )
        )


def _tuples(view: RoundView) -> list[tuple[float, ...]]:
    """Survival of the looked-up tokens of each request."""
    if view.looked_up is None:
        return [()] * len(view.ids)
    return [tuple(row[row >= 0.0].tolist()) for row in view.looked_up]
