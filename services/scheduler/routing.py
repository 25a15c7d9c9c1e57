"""Which verifier takes a request: the least expected time for it, prefill that its cache saves included.

Pure: candidates in, a choice out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.records import Replica
from services.scheduler.pace import VerifierPace

HORIZON_ROUNDS = 64
"""A request is costed over so many rounds: how long it will really be is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    replica: Replica
    requests: int
    """Running, waiting and on their way."""
    max_running: int = 0
    """0: not known, no bound."""
    free_kv_fraction: float = 1.0
    pace: VerifierPace
    matched_tokens: int = 0
    """Prompt tokens its prefix cache probably holds."""
    silent_seconds: float = 0.0

    def round_seconds(self) -> float | None:
        """With the new request; None without a curve."""
        seconds = self.pace.round_seconds(self.requests + 1)
        return None if seconds is None else max(seconds, self.silent_seconds)

    def seconds_for(self, prompt_tokens: int) -> float | None:
        """Expected time to serve the request; None without a curve."""
        seconds = self.round_seconds()
        if seconds is None:
            return None
        rounds = float(HORIZON_ROUNDS)
        if self.max_running:
            # Who is beyond the batch waits until that share of it has ended.
            rounds *= 1.0 + max(0, self.requests + 1 - self.max_running) / self.max_running
        return rounds * seconds + self.pace.prefill_seconds(prompt_tokens - self.matched_tokens)


def choose(candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
    """`candidates` must not be empty. Verifiers without a curve compare by their number of requests
    at the mean pace of those with one; among equals the most free cache, then the first id."""
    known = [c.seconds_for(prompt_tokens) for c in candidates]
    pairs = zip(candidates, known, strict=True)
    paces = [seconds / (c.requests + 1) for c, seconds in pairs if seconds is not None]
    mean = sum(paces) / len(paces) if paces else 1.0

    def preference(index: int) -> tuple[float, float, str]:
        candidate, seconds = candidates[index], known[index]
        if seconds is None:
            seconds = mean * (candidate.requests + 1)
        return seconds, -candidate.free_kv_fraction, candidate.replica.replica_id

    return candidates[min(range(len(candidates)), key=preference)]
