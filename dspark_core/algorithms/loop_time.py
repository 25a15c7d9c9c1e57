"""Time of a round outside drafting and the target pass: a constant per round plus a constant per request.

Covers committing and delivering tokens, admitting requests, choosing whom to draft for, and whatever else
the process does in between. It does not depend on the verify lengths, so every plan pays it; the
larger it is, the more a round should bring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark_core.errors import ConfigError

RATE = 0.05
"""Weight of the newest round in the estimate."""
MAX_SURPRISE = 2.0
"""Bound on how far one round may deviate from the expectation: a stall says little about the next round."""
TYPICAL_REQUESTS = 8
"""Number of requests at which the per-round and per-request parts learn at the same rate."""
FLOOR_SECONDS = 5e-5
"""Minimum expected duration assumed when bounding the deviation."""


@dataclass(frozen=True, slots=True)
class LoopTimeModel:
    round_seconds: float = 0.0
    request_seconds: float = 0.0
    """Added for each request of the round."""

    def __post_init__(self) -> None:
        for name in ("round_seconds", "request_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} of a loop-time model must be >= 0, got {value}")

    def seconds(self, requests: int) -> float:
        return self.round_seconds + self.request_seconds * requests

    def observed(self, requests: int, seconds: float) -> LoopTimeModel:
        """Updates on one more round, moving both parts by their share in explaining the deviation."""
        if requests < 0 or not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(
                f"an observed loop needs requests and seconds >= 0, got {requests} and {seconds}"
            )
        expected = self.seconds(requests)
        reach = (MAX_SURPRISE - 1.0) * max(expected, FLOOR_SECONDS)
        surprise = min(max(seconds - expected, -reach), reach)
        load = requests / TYPICAL_REQUESTS
        step = RATE * surprise / (1.0 + load * load)
        return LoopTimeModel(
            max(self.round_seconds + step, 0.0),
            max(self.request_seconds + step * load / TYPICAL_REQUESTS, 0.0),
        )


NO_LOOP = LoopTimeModel()
"""For use where the loop time is unknown."""
