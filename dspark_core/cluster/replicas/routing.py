"""Chooses a verifier for a request by expected time, given the prefill its cache saves; of those expected to
take about as long, by load.

Pure: candidates in, a choice out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.cluster.planning.pace import PREFILL_TOKENS, VerifierPace
from dspark_core.records import Replica

HORIZON_ROUNDS = 64
"""Rounds assumed per request, whose real length is unknown."""
FLOOR_MARGIN = 1.05
"""A floor counts as held only if the expected speed exceeds it by this factor: expectations are means."""
MAX_CONCURRENCY = 1024
ALIKE = 0.1
"""Expected times that exceed the least by no more than this share of it count as equal. Where more requests
hardly make rounds longer, noise in the estimates would otherwise gather requests on a few verifiers, slowing
each of them a little, while the others idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    replica: Replica
    requests: int
    """Running, waiting and assigned but not yet arrived."""
    max_running: int = 0
    """0: unknown, no bound."""
    free_kv_fraction: float = 1.0
    pace: VerifierPace
    matched_tokens: int = 0
    """Prompt tokens its prefix cache probably holds."""
    idle_seconds: float = 0.0
    """Time since its last reported round."""
    highest_floor: float = 0.0
    """Highest promised speed floor (tokens per second) of its requests, of those within reach; 0 if none."""

    def holds(self, floor: float) -> bool:
        """Whether every promised floor, including the new request's, still holds with one more request.

        A verifier that is idle or has no curve takes any request. Floors of running requests that even a
        lone request would not reach are disregarded: otherwise a single such request, or a slowdown, would
        close the verifier to all others.
        """
        seconds = self.round_seconds()
        if seconds is None or self.requests == 0:
            return True
        if floor and floor > reach_of(self.pace, self.idle_seconds):
            return False
        highest = max(floor, self.highest_floor)
        return not highest or self.pace.accepted_length / seconds >= FLOOR_MARGIN * highest

    def floor_concurrency(self) -> int | None:
        """The largest number of requests at which its floors hold; None without floors or curve.

        Where a noisy profile has more requests run faster, it may be a smaller number, at which floors hold
        while they do not at one more: to try all of them takes long.
        """
        if not self.highest_floor or self.pace.round_seconds(1) is None:
            return None
        needed = FLOOR_MARGIN * self.highest_floor
        most = self.max_running or MAX_CONCURRENCY
        held, broken = 1, most + 1
        while broken - held > 1:
            middle = (held + broken) // 2
            if (self.pace.tokens_per_second(middle) or 0.0) >= needed:
                held = middle
            else:
                broken = middle
        return held

    def round_seconds(self) -> float | None:
        """Round time with the new request; None without a curve."""
        return self._relaxed(self.pace.round_seconds(self.requests + 1))

    def seconds_for(self, prompt_tokens: int) -> float | None:
        """Expected time to serve the request without drafts; None without a curve."""
        seconds = self._relaxed(self.pace.plain_seconds(self.requests + 1))
        if seconds is None:
            return None
        rounds = expected_rounds(self.requests + 1, self.max_running)
        return rounds * seconds + self.pace.prefill_seconds(prompt_tokens - self.matched_tokens)

    def _relaxed(self, seconds: float | None) -> float | None:
        if seconds is not None and self.requests == 0:
            return seconds * self.pace.relaxation(self.idle_seconds)
        return seconds


def expected_rounds(requests: int, max_running: int) -> float:
    """Rounds that pass until the last of a verifier's requests is done. `max_running` 0: no bound."""
    rounds = float(HORIZON_ROUNDS)
    if max_running:
        # Requests in excess of the batch wait until as many running ones have ended.
        rounds *= 1.0 + max(0, requests - max_running) / max_running
    return rounds


def reach_of(pace: VerifierPace, idle_seconds: float) -> float:
    """The highest floor that holds for a lone request; infinite without a curve."""
    alone = pace.tokens_per_second(1)
    return math.inf if alone is None else alone / pace.relaxation(idle_seconds) / FLOOR_MARGIN


def choose(candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
    """Chooses one of `candidates`, which must not be empty.

    Of those whose expected times are alike, the one with the fewest requests is chosen; a pass of prompt
    tokens that its cache does not save counts as a request. Ties go to the shortest time, the most free KV
    cache, the first id. A verifier without a curve is given the others' mean time per request.
    """
    known = [(c.requests + 1, c.seconds_for(prompt_tokens)) for c in candidates]
    paces = [seconds / requests for requests, seconds in known if seconds is not None]
    mean = sum(paces) / len(paces) if paces else 1.0
    expected = [mean * requests if seconds is None else seconds for requests, seconds in known]
    longest = (1.0 + ALIKE) * min(expected)

    def preference(index: int) -> tuple[float, float, float, str]:
        candidate = candidates[index]
        unread = max(prompt_tokens - candidate.matched_tokens, 0)
        load = candidate.requests + unread / PREFILL_TOKENS
        return load, expected[index], -candidate.free_kv_fraction, candidate.replica.replica_id

    alike = [index for index, seconds in enumerate(expected) if seconds <= longest]
    return candidates[min(alike, key=preference)]
