"""What planners plan for. Values only; no numpy, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.errors import InvalidRequestError
from dspark_core.records import DraftOrigin


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """One request of the round being planned."""

    sequence_id: str = ""
    survival: Sequence[float] = ()
    """a_1, a_2, ...: probability that the token and all before it are accepted; never rises."""
    floor_tokens_per_second: float | None = None
    """None: no speed was promised."""
    context_tokens: int = 0
    coupled: bool = False
    """Accepted iff equal to the target's own sample: no choice of length can bias the output, so
    planning may look at the whole round. Greedy requests too."""
    origin: DraftOrigin = DraftOrigin.DRAFTER
    """Whose tokens these are: only the drafter's cost drafting time."""
    granted: float = 0.0
    """Draft tokens verified for it per round so far; of equal tokens, the request with fewer goes first."""

    def __post_init__(self) -> None:
        floor = self.floor_tokens_per_second
        if floor is not None and not (math.isfinite(floor) and floor > 0):
            raise InvalidRequestError(
                f"floor_tokens_per_second must be > 0, got {floor}", field="floor_tokens_per_second"
            )
        if self.context_tokens < 0:
            raise InvalidRequestError(
                f"context_tokens must be >= 0, got {self.context_tokens}", field="context_tokens"
            )
