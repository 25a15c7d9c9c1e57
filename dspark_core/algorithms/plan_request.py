"""Planner input for one request. Values only; no numpy, no torch."""

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
    """a_1, a_2, ...: probability that the token and all before it are accepted; non-increasing."""
    floor_tokens_per_second: float | None = None
    """None: no speed floor."""
    context_tokens: int = 0
    coupled: bool = False
    """Tokens are accepted iff equal to the target's own choice, so no verify length can bias the output and
    planning may look at the whole round. Also set for greedy requests."""
    origin: DraftOrigin = DraftOrigin.DRAFTER
    """Only the drafter's tokens cost drafting time."""
    temperature: float = 0.0
    """It samples at."""
    granted: float = 0.0
    """Draft tokens verified for it per round so far; on ties the request with fewer goes first."""

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
