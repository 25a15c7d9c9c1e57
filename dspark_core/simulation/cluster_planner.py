"""Array version of the scheduler's planner: delayed capacities, floors first, drafts where they pay their
price."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from dspark_core.algorithms.draft_price import DraftDemand, draft_prices
from dspark_core.algorithms.drafting_choice import better_looked_up, worth_drafting
from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.speed_floor import expected_tokens
from dspark_core.algorithms.step_surface import Floats
from dspark_core.simulation.planners import REFRESH_ROUNDS, Delayed, RoundOutcome, RoundView

JUDGE_RATE = 0.2
"""Weight of the newest round in the moving averages of what drafts bring."""
PROBE_ROUNDS = 32
"""Every so many rounds, all requests are drafted for, to measure those that otherwise are not."""


class Pool:
    """State shared by the verifiers of one cluster: statistics of requests, and a price for each drafter.

    Call it with each verifier's round times, in the order of the verifiers, to make its planner.
    """

    def __init__(self, drafters: int, *, priced: bool) -> None:
        """`drafters`: assigned to verifiers round-robin; 0: one per verifier, which has no price."""
        self._drafters = drafters
        self._priced = priced and drafters > 0
        self._made = 0
        self._markets = [_Market() for _ in range(drafters)]
        self.gains = np.full(1024, np.nan)
        self.verified = np.full(1024, np.nan)
        self.chosen = np.zeros(1024, dtype=np.bool_)

    def __call__(self, round_time: RoundTimeModel) -> ClusterPlanner:
        index, self._made = self._made, self._made + 1
        market = self._markets[index % self._drafters] if self._priced else None
        return ClusterPlanner(round_time, self, market, index)

    def make_room(self, ids: Ints) -> None:
        missing = int(ids.max(initial=0)) + 1 - len(self.gains)
        if missing > 0:
            more = max(missing, len(self.gains))
            self.gains = np.concatenate((self.gains, np.full(more, np.nan)))
            self.verified = np.concatenate((self.verified, np.full(more, np.nan)))
            self.chosen = np.concatenate((self.chosen, np.zeros(more, dtype=np.bool_)))


class _Market:
    """Demands of one drafter's verifiers; prices are recomputed after as many reports as verifiers.

    Not `dspark_core.cluster.planning.draft_market`, although both call `draft_prices`: that one learns what
    drafts bring from reports, by request, and by a clock, and forgets verifiers that fall silent. Here it is
    in arrays that the planner needs anyway, and nobody falls silent.
    """

    def __init__(self) -> None:
        self._demands: dict[int, DraftDemand] = {}
        self._prices: dict[int, float] = {}
        self._news = 0

    def price(self, verifier: int, demand: DraftDemand) -> float:
        self._demands[verifier] = demand
        self._news += 1
        if self._news >= len(self._demands):
            self._news = 0
            found = draft_prices(list(self._demands.values()))
            self._prices = dict(zip(self._demands, found.of, strict=True))
        return self._prices.get(verifier, 0.0)


class ClusterPlanner(Delayed):
    """Planner of one verifier."""

    looks_up: ClassVar[bool] = True

    def __init__(self, round_time: RoundTimeModel, pool: Pool, market: _Market | None, index: int) -> None:
        super().__init__()
        self._round_time = round_time
        self._pool = pool
        self._market = market
        self._index = index
        self._ids: Ints = np.zeros(0, dtype=np.int64)
        self._drafted = 0
        self._chosen: Bools | None = None
        """Requests drafted for this round; None: all."""
        self._price = 0.0
        self._since_choice = REFRESH_ROUNDS
        self._since_probe = 0
        self._unknown = True
        """No draft was seen yet, so all requests are drafted for."""
        self._gain, self._verified = 1.0, 1.0
        self._transit = 0.0
        """Moving average of the seconds on the network and in the drafter's queue."""
        self._known_times = replace(round_time, network_seconds=self._transit)
        self._used = 0.0
        """Moving average of this verifier's share of the drafter's time."""
        self._way: float | None = None
        """Minimum transit seconds seen: the network without a queue."""

    def drafted(self, view: RoundView) -> Bools | None:
        self._chosen = self._choice(view)
        return self._chosen

    def _choice(self, view: RoundView) -> Bools | None:
        if view.ids is not self._ids:  # requests joined or left
            self._pool.make_room(view.ids)
        self._ids = view.ids
        if self._unknown:
            return None
        self._since_choice += 1
        if self._since_choice >= REFRESH_ROUNDS:
            self._since_choice = 0
            self._choose(view)
        chosen: Bools = self._pool.chosen[view.ids]
        if np.count_nonzero(view.floors):
            chosen |= self._floor_needs(view)
        if view.looked_up is None and chosen.all():
            return None
        self._since_probe += 1
        if self._since_probe >= PROBE_ROUNDS:
            self._since_probe = 0
            chosen = np.ones(len(view.ids), dtype=np.bool_)
        if view.looked_up is not None and np.count_nonzero(chosen):
            chosen &= ~self._better_looked_up(view, view.looked_up)
        return chosen

    def plan(self, batch: PlanBatch, seconds: Floats) -> Ints:
        lengths = super().plan(batch, seconds)
        self._drafted = 0
        if self._chosen is not None and not np.count_nonzero(self._chosen):
            return lengths
        drafted = (batch.survival[:, :1] >= 0.0).any(axis=1)
        if self._chosen is not None:
            drafted &= self._chosen
        self._drafted = int(drafted.sum())
        if self._drafted:
            self._unknown = False
            self._judge(expected_tokens(batch, lengths)[drafted] - 1.0, lengths[drafted], self._ids[drafted])
        return lengths

    def learn(self, outcome: RoundOutcome) -> None:
        seconds = outcome.draft_seconds + outcome.step_seconds + outcome.loop_seconds
        used = self._round_time.draft.seconds(self._drafted) / seconds
        self._used += JUDGE_RATE * (used - self._used)
        if self._drafted:
            transit = max(outcome.draft_seconds - self._round_time.draft.seconds(self._drafted), 0.0)
            self._transit += JUDGE_RATE * (transit - self._transit)
            self._way = transit if self._way is None else min(self._way, transit)

    def _judge(self, gains: Floats, verified: Ints, ids: Ints) -> None:
        """Update the moving averages; a single round alone says little."""
        self._gain += JUDGE_RATE * (float(gains.mean()) - self._gain)
        self._verified += JUDGE_RATE * (float(verified.mean()) - self._verified)
        for known, news, mean in (
            (self._pool.gains, gains, self._gain),
            (self._pool.verified, verified, self._verified),
        ):
            before = np.where(np.isnan(known[ids]), mean, known[ids])
            known[ids] = before + JUDGE_RATE * (news - before)

    def _floor_needs(self, view: RoundView) -> Bools:
        """Requests whose floor plain rounds would break; the criterion of the production policy."""
        count = len(view.ids)
        plain = self._round_time.seconds(count, count, int(view.context_tokens.sum()))
        needs: Bools = view.floors * plain > 1.0
        return needs

    def _expected(self, view: RoundView) -> tuple[Floats, Floats]:
        """Expected accepted and verified tokens per request if the drafter drafts for it."""
        gains, verified = self._pool.gains[view.ids], self._pool.verified[view.ids]
        unknown = np.isnan(gains)
        gains[unknown], verified[unknown] = self._gain, self._verified
        return gains * view.draftable, verified * view.draftable

    def _better_looked_up(self, view: RoundView, lookups: Floats) -> Bools:
        gains, verified = self._expected(view)
        longest = int(np.count_nonzero((lookups >= 0.0).any(axis=0)))
        context = int(view.context_tokens.sum())
        return better_looked_up(lookups[:, :longest], gains, verified, self._times(), context, self._price)

    def _choose(self, view: RoundView) -> None:
        gains, verified = self._expected(view)
        context = int(view.context_tokens.sum())
        if self._market is not None:
            demand = DraftDemand(
                gains=gains,
                verified=verified,
                round_time=replace(self._round_time, network_seconds=self._way or 0.0),
                context_tokens=context,
                queue_seconds=max(self._transit - (self._way or 0.0), 0.0),
                used=self._used,
                drafting=bool(self._pool.chosen[view.ids].any()),
            )
            self._price = self._market.price(self._index, demand)
        self._pool.chosen[view.ids] = worth_drafting(gains, verified, self._times(), context, self._price)

    def _times(self) -> RoundTimeModel:
        """Round times with the recent mean transit to the drafter."""
        if self._known_times.network_seconds != self._transit:
            self._known_times = replace(self._round_time, network_seconds=self._transit)
        return self._known_times
