"""Discrete-event simulation of a cluster: verifiers run rounds, drafters serve them first come, first served.

Each event is a round of one verifier: it commits the previous round's tokens, admits requests, then drafts,
plans and times the next round. With two cohorts, drafts are requested when the cohort's previous round ends.
Plans come from the same planners as in production, times from the measured model, accepted tokens from
recorded rounds. Requests are routed by the scheduler's rule. Not modelled: faults, preemption, the gateway's
queues, any network but the path to the drafter, and the scheduler's admission: requests are taken whatever
speed floors they break, so that a planner is judged by the floors it keeps.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats
from dspark_core.engine.rounds.pacing import PrefillPacer, prompt_shares
from dspark_core.simulation.cohort import Asked, Cohort, even_out, new_cohorts
from dspark_core.simulation.decoding import Decoding
from dspark_core.simulation.domains import DomainRounds
from dspark_core.simulation.planner_names import PlannerFactory
from dspark_core.simulation.planners import RoundOutcome, RoundView
from dspark_core.simulation.population import Population
from dspark_core.simulation.records import Ledger
from dspark_core.simulation.router import Router
from dspark_core.simulation.scenario import Scenario
from dspark_core.simulation.time_tables import TimeTables

PROGRESS_ROUNDS = 2000
SLOW_FACTOR = 2.0


@dataclass(slots=True)
class _Verifier:
    index: int
    cohorts: tuple[Cohort, ...]
    slowdown: float
    pacer: PrefillPacer | None = None
    prefilling: list[int] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    prefilled: list[int] = field(default_factory=list)
    """Requests whose prefill the current round completes."""
    turn: int = 0
    """Index of the cohort of the current round."""
    busy: bool = False

    @property
    def running(self) -> int:
        return sum(cohort.size for cohort in self.cohorts) + len(self.prefilling)

    def next_cohort(self) -> Cohort:
        """Switch to the other cohort if it has requests -> the cohort of the next round."""
        other = (self.turn + 1) % len(self.cohorts)
        if len(self.cohorts[other].active):
            self.turn = other
        return self.cohorts[self.turn]


class Cluster:
    """One simulation; `run` can be called once."""

    def __init__(
        self,
        scenario: Scenario,
        recorded: DomainRounds,
        population: Population,
        round_time: RoundTimeModel,
        planner: PlannerFactory,
        *,
        mtp1: bool = False,
    ) -> None:
        self._scenario = scenario
        self._recorded = recorded
        self._people = population
        self._mtp1 = mtp1
        self._ledger = Ledger(scenario, population)
        pace = scenario.max_step_seconds
        slow = round(scenario.slow_verifiers * scenario.verifiers)
        self._verifiers = [
            _Verifier(
                i,
                new_cohorts(scenario.cohorts, planner, round_time, population),
                SLOW_FACTOR if i < slow else 1.0,
                PrefillPacer(pace, round_time.verify) if pace else None,
            )
            for i in range(scenario.verifiers)
        ]
        looking = recorded.looked_up.shape[1] > 0 and not scenario.no_lookup
        self._looks_up = looking and self._verifiers[0].cohorts[0].planner.looks_up
        self._has_draft = recorded.survival[:, 0] >= 0.0
        self._coupled = np.full(scenario.max_running, scenario.coupled)
        longest = recorded.longest if self._looks_up else recorded.block_size
        self._tables = TimeTables(round_time, longest, scenario.prefill_chunk_tokens)
        self._router = Router(
            round_time,
            [verifier.slowdown for verifier in self._verifiers],
            scenario.max_running,
            float(population.prompt_tokens.mean() + population.answer_tokens.mean() / 2),
        )
        self._drafter_free = np.zeros(scenario.drafters or scenario.verifiers)
        self._events: list[tuple[float, int]] = []
        self._prefill_left = population.prompt_tokens.tolist()
        self._next = 0
        self._ended = 0
        # An MTP-1 head has its own acceptance rate: one draw per recorded row, shared by all requests.
        marks = np.random.default_rng(scenario.seed + 1).random(len(recorded.accepted))
        self._mtp1_stands = marks < scenario.mtp1_accept if scenario.mtp1_accept else recorded.accepted >= 1

    def run(self, on_ended: Callable[[int], None] = lambda _: None) -> Ledger:
        """`on_ended` gets the number of ended requests every PROGRESS_ROUNDS rounds and at the end."""
        scenario, rounds = self._scenario, 0
        for _ in range(min(scenario.users, scenario.requests)):
            self._arrive(0.0)
        while self._ended < scenario.requests:
            now = self._events[0][0] if self._events else np.inf
            if scenario.arrivals_per_second and self._next < scenario.requests:
                arrival = float(self._people.arrival[self._next])
                if arrival <= now:
                    self._arrive(arrival)
                    continue
            now, index = heapq.heappop(self._events)
            verifier = self._verifiers[index]
            self._finish_round(verifier, now)
            self._begin_round(verifier, now)
            rounds += 1
            if rounds % PROGRESS_ROUNDS == 0:
                on_ended(self._ended)
        on_ended(self._ended)
        return self._ledger

    def _arrive(self, now: float) -> None:
        request, self._next = self._next, self._next + 1
        verifier = self._verifiers[self._router.choose(self._prefill_left[request])]
        self._ledger.arrived[request] = now
        verifier.waiting.append(request)
        if not verifier.busy:
            verifier.busy = True
            heapq.heappush(self._events, (now, verifier.index))

    def _finish_round(self, verifier: _Verifier, now: float) -> None:
        cohort = verifier.cohorts[verifier.turn]
        active = cohort.active
        if len(active):
            active.commit(cohort.committed)
            for request in active.drop_ended():
                self._end(verifier, request, now)
        cohort.receive()
        if verifier.prefilled:
            fresh = np.array(verifier.prefilled, dtype=np.int64)
            self._ledger.first_token[fresh] = now
            active.join(fresh)
            for request in active.drop_ended():  # one-token answers
                self._end(verifier, request, now)
            verifier.prefilled = []
        if len(verifier.cohorts) > 1:
            even_out(cohort, verifier.cohorts[1 - verifier.turn])
            if len(active):
                cohort.asked = self._ask(verifier, cohort, now)

    def _end(self, verifier: _Verifier, request: int, now: float) -> None:
        self._ledger.ended[request] = now
        self._ended += 1
        self._router.ended(verifier.index)
        if self._scenario.users and self._next < self._scenario.requests:
            self._arrive(now)

    def _begin_round(self, verifier: _Verifier, now: float) -> None:
        while verifier.waiting and verifier.running < self._scenario.max_running:
            verifier.prefilling.append(verifier.waiting.popleft())
        cohort = verifier.next_cohort()
        decoding = len(cohort.active)
        if not decoding:
            runs, prefill = self._prefill(verifier, self._scenario.prefill_chunk_tokens)
            if runs == 0:
                verifier.busy = False
                return
            step = float(self._tables.step(runs, 0)[prefill - runs]) * verifier.slowdown
            self._schedule(verifier, now, 0.0, step, self._loop_seconds(runs))
            return
        asked, cohort.asked = cohort.asked or self._ask(verifier, cohort, now), None
        batch, wait = self._batch(cohort.active, asked), asked.wait(now)
        loop = self._loop_seconds(decoding)
        # As in production, the planner does not know about prefill. With several cohorts, each has only every
        # n-th round, so the floors see n times the round's time.
        steps = self._tables.step(decoding, batch.context_tokens)
        turns = sum(len(one.active) > 0 for one in verifier.cohorts)
        lengths = cohort.planner.plan(batch, turns * (steps[: batch.survival.size + 1] + (wait + loop)))
        verified = int(lengths.sum())
        runs, prefill = self._prefill(verifier, self._allowance(verifier, decoding + verified, batch))
        if runs:
            steps = self._tables.step(decoding + runs, batch.context_tokens)
        step = float(steps[verified + prefill - runs]) * verifier.slowdown
        if runs and verifier.pacer is not None:
            verifier.pacer.observe(decoding, decoding + verified, prefill, batch.context_tokens, step)
        accepted = np.minimum(self._accepted(asked.rows, asked.drafted), lengths)
        cohort.committed = np.minimum(accepted + 1, cohort.active.left)
        cohort.active.advance(cohort.committed, lengths)
        tokens = decoding + verified + prefill
        cohort.planner.learn(
            RoundOutcome(lengths, accepted, tokens, batch.context_tokens, asked.seconds, step, loop)
        )
        self._ledger.decoded(decoding, verified, int(accepted.sum()), wait, asked.seconds)
        self._schedule(verifier, now, wait, step, loop)

    def _allowance(self, verifier: _Verifier, decode_tokens: int, batch: PlanBatch) -> int:
        """Prompt tokens that may join a round, according to the production pacer."""
        most = self._scenario.prefill_chunk_tokens
        if verifier.pacer is None or not verifier.prefilling:
            return most
        return verifier.pacer.allowance(batch.requests, decode_tokens, batch.context_tokens, most)

    def _loop_seconds(self, requests: int) -> float:
        return self._tables.model.loop.seconds(requests) + self._scenario.round_overhead_seconds

    def _schedule(self, verifier: _Verifier, now: float, wait: float, step: float, loop: float) -> None:
        seconds = wait + step + loop
        self._ledger.busy(seconds)
        heapq.heappush(self._events, (now + seconds, verifier.index))

    def _prefill(self, verifier: _Verifier, most: int) -> tuple[int, int]:
        """Take at most `most` prompt tokens, shared as in production -> requests and tokens in the pass."""
        prompts = verifier.prefilling
        if not prompts:
            return 0, 0
        shares = prompt_shares([self._prefill_left[request] for request in prompts], most)
        for request, count in zip(prompts, shares, strict=True):
            self._prefill_left[request] -= count
        verifier.prefilled.extend(request for request in prompts if not self._prefill_left[request])
        verifier.prefilling = [request for request in prompts if self._prefill_left[request]]
        return sum(count > 0 for count in shares), sum(shares)

    def _ask(self, verifier: _Verifier, cohort: Cohort, now: float) -> Asked:
        """Look up drafts, and ask the drafter for those requests the planner chooses."""
        active = cohort.active
        rows = active.rows()
        # A round always commits a bonus token, so the last token of an answer needs no draft.
        most = active.left - 1
        lookups = None
        if self._looks_up:
            lookups = _at_most(self._recorded.looked_up.take(rows, axis=0), most)
        draftable = self._has_draft.take(rows) & (most > 0)
        view = RoundView(active.ids, active.context, active.floors, draftable, lookups)
        chosen = cohort.planner.drafted(view)
        wanted = draftable if chosen is None else draftable & chosen
        count = int(np.count_nonzero(wanted))
        return Asked(
            rows=rows,
            most=most,
            lookups=lookups,
            drafted=wanted if count else None,
            at=now,
            seconds=self._draft_seconds(verifier, now, count) if count else 0.0,
        )

    def _batch(self, active: Decoding, asked: Asked) -> PlanBatch:
        """The planner's input."""
        count = len(active)
        # `looked_up` is left at zero: the seconds given to the planner already include drafting.
        return PlanBatch(
            survival=self._survival(asked),
            floors=active.floors,
            granted=active.granted / np.maximum(active.rounds, 1),
            coupled=self._coupled[:count],
            context_tokens=int(active.context.sum()),
        )

    def _survival(self, asked: Asked) -> Floats:
        """Survival of drafted tokens, of looked-up ones where nobody drafted [requests, longest]."""
        rows, drafted, lookups = asked.rows, asked.drafted, asked.lookups
        if drafted is None:
            return np.full((len(rows), 1), -1.0) if lookups is None else lookups
        drafts = _at_most(self._recorded.survival.take(rows, axis=0), asked.most)
        drafts[~drafted] = -1.0
        if lookups is None:
            return drafts
        survival = np.full((len(rows), max(drafts.shape[1], lookups.shape[1])), -1.0)
        survival[:, : lookups.shape[1]] = lookups
        survival[drafted] = -1.0
        survival[drafted, : drafts.shape[1]] = drafts[drafted]
        return survival

    def _accepted(self, rows: Ints, drafted: Bools | None) -> Ints:
        """Draft tokens of each request that would be accepted if all were verified."""
        looked_up: Ints = self._recorded.looked_up_accepted.take(rows)
        if drafted is None:
            return looked_up
        accepted = self._mtp1_stands if self._mtp1 else self._recorded.accepted
        return np.where(drafted, accepted.take(rows), looked_up)

    def _draft_seconds(self, verifier: _Verifier, now: float, drafted: int) -> float:
        """Seconds until the drafts arrive: network, the drafter's queue, drafting."""
        seconds = self._tables.draft(drafted)
        if self._mtp1:
            seconds *= self._scenario.mtp1_draft_share
        drafter = verifier.index % len(self._drafter_free)
        way = self._scenario.network_rtt_seconds / 2.0
        start = max(now + way, float(self._drafter_free[drafter]))
        self._drafter_free[drafter] = start + seconds
        self._ledger.drafted(seconds, start - now - way)
        return start + seconds + way - now


def _at_most(survival: Floats, most: Ints) -> Floats:
    """Cut each row to `most` [requests] tokens, in place."""
    np.copyto(survival, -1.0, where=np.arange(survival.shape[1]) >= most[:, None])
    return survival
