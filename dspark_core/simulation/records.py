"""What a simulation records while it runs, and the summary computed from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_core.simulation.population import Population
from dspark_core.simulation.scenario import Scenario

FLOOR_TOLERANCE = 0.01
"""Shortfall below a floor that is tolerated, because one round more or less at the end makes that much."""
PERCENTILES = (5, 50, 95)


class Ledger:
    def __init__(self, scenario: Scenario, population: Population) -> None:
        self._scenario = scenario
        self._population = population
        self.arrived = np.full(scenario.requests, np.nan)
        self.first_token = np.full(scenario.requests, np.nan)
        self.ended = np.full(scenario.requests, np.nan)
        self._rounds = 0
        self._request_rounds = 0
        self._verified = 0
        self._accepted = 0
        self._draft_wait = 0.0
        self._draft_busy = 0.0
        self._draft_seconds = 0.0
        self._draft_queue = 0.0
        self._draft_calls = 0
        self._busy = 0.0
        # Indexed by the number of requests decoding together: [max_running + 1].
        self._verified_by_load = np.zeros(scenario.max_running + 1, dtype=np.int64)
        self._rounds_by_load = np.zeros(scenario.max_running + 1, dtype=np.int64)

    def decoded(self, decoding: int, tokens: int, accepted: int, wait: float, draft_seconds: float) -> None:
        """Record a round: requests decoding, draft tokens verified and accepted, the round's wait for drafts,
        and `draft_seconds` from requesting the drafts to their arrival."""
        self._request_rounds += decoding
        self._verified += tokens
        self._accepted += accepted
        self._draft_wait += wait
        self._draft_seconds += draft_seconds
        self._verified_by_load[decoding] += tokens
        self._rounds_by_load[decoding] += 1

    def busy(self, seconds: float) -> None:
        """Record the time of any round, including those with prefill only."""
        self._rounds += 1
        self._busy += seconds

    def drafted(self, seconds: float, queued: float) -> None:
        self._draft_busy += seconds
        self._draft_queue += queued
        self._draft_calls += 1

    def summary(self, planner: str) -> Summary:
        scenario, people = self._scenario, self._population
        seconds = float(np.nanmax(self.ended) - np.nanmin(self.arrived))
        tokens = int(people.answer_tokens.sum())
        decode = self.ended - self.first_token
        judged = (people.answer_tokens > 1) & (decode > 0)
        speed = (people.answer_tokens[judged] - 1) / decode[judged]
        promised = people.floor[judged]
        broken = (promised > 0) & (speed < promised * (1.0 - FLOOR_TOLERANCE))
        calls = max(self._draft_calls, 1)
        rounds = max(self._request_rounds, 1)
        return Summary(
            planner=planner,
            requests=scenario.requests,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            steady_tokens_per_second=self._steady_rate(),
            user_speed=_percentiles(speed),
            time_to_first_token=_percentiles(self.first_token - self.arrived),
            rounds=self._rounds,
            accepted_length=1.0 + self._accepted / rounds,
            verify_length=self._verified / rounds,
            verify_length_by_load=self._by_load(),
            promised=int((promised > 0).sum()),
            floors_broken=int(broken.sum()),
            verifier_utilisation=self._busy / (seconds * scenario.verifiers),
            drafter_utilisation=self._draft_busy / (seconds * (scenario.drafters or scenario.verifiers)),
            draft_queue_seconds=self._draft_queue / calls,
            draft_queue_share=self._draft_queue / max(self._draft_seconds, 1e-12),
            draft_wait_share=self._draft_wait / max(self._busy, 1e-12),
        )

    def _steady_rate(self) -> float:
        """Tokens per second between the first and last tenth of completions, without ramp-up and drain."""
        order = np.argsort(self.ended)
        low, high = len(order) // 10, len(order) - 1 - len(order) // 10
        span = float(self.ended[order[high]] - self.ended[order[low]])
        if span <= 0:
            return float(self._population.answer_tokens.sum() / np.nanmax(self.ended))
        return float(self._population.answer_tokens[order[low + 1 : high + 1]].sum()) / span

    def _by_load(self) -> tuple[tuple[int, float], ...]:
        seen = np.flatnonzero(self._rounds_by_load[1:]) + 1
        return tuple(
            (int(load), float(self._verified_by_load[load] / (self._rounds_by_load[load] * load)))
            for load in seen
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    planner: str
    requests: int
    tokens: int
    seconds: float
    """Simulated time from the first arrival to the last completion."""
    tokens_per_second: float
    steady_tokens_per_second: float
    """Without the ramp-up at the start and the drain at the end."""
    user_speed: tuple[float, ...]
    """Tokens per second of a request after its first token, at PERCENTILES."""
    time_to_first_token: tuple[float, ...]
    rounds: int
    accepted_length: float
    verify_length: float
    """Draft tokens verified per request and round."""
    verify_length_by_load: tuple[tuple[int, float], ...]
    """(requests decoding together, verify length)"""
    promised: int
    """Requests with a floor and a measurable speed."""
    floors_broken: int
    verifier_utilisation: float
    drafter_utilisation: float
    draft_queue_seconds: float
    """Mean wait for a drafter busy with other verifiers."""
    draft_queue_share: float
    """Share of queueing in the time from requesting drafts to their arrival."""
    draft_wait_share: float
    """Share of the rounds' time spent waiting for drafts."""


def _percentiles(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Zeros when there are no finite values, as when all answers have one token."""
    known = values[np.isfinite(values)]
    if not len(known):
        return (0.0,) * len(PERCENTILES)
    return tuple(float(value) for value in np.percentile(known, PERCENTILES))
