"""What a round takes besides drafting and its target pass: so much a round, and so much a request.

Committing and delivering tokens, admitting requests, choosing whom to draft for, and whatever else
the process does in between. It is the same however much is verified, so every planner pays it; the
dearer it is, the more a round should bring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark_core.errors import ConfigError

RATE = 0.05
"""Weight of the newest round."""
MAX_SURPRISE = 2.0
"""How far one round may be from the expectation: a stall says little about the next round."""
TYPICAL_REQUESTS = 8
"""At which a round's own part and that of its requests learn alike."""
FLOOR_SECONDS = 5e-5
"""Below this a round counts as taking this long, when it is told how surprising one is."""


@dataclass(frozen=True, slots=True)
class LoopTimeModel:
    round_seconds: float = 0.0
    request_seconds: float = 0.0
    """For each request of the round, on top."""

    def __post_init__(self) -> None:
        for name in ("round_seconds", "request_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} of a loop-time model must be >= 0, got {value}")

    def seconds(self, requests: int) -> float:
        return self.round_seconds + self.request_seconds * requests

    def observed(self, requests: int, seconds: float) -> LoopTimeModel:
        """After one more round. The step goes where it explains most for the number of requests."""
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
"""Where nothing is known of it."""
