"""What planners plan for and what they answer. Values only; no numpy, no torch."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Verify lengths in the order of the requests, and what is expected of them."""

    lengths: tuple[int, ...]
    drafting: tuple[bool, ...]
    """Whether it pays to draft for the request in a later round like this one."""
    expected_tokens: float
    """Tokens committed by the round, the bonus tokens included."""
    expected_seconds: float
    unmet_floors: tuple[int, ...] = ()
    """Indices of requests whose floor this plan does not hold."""

    @property
    def throughput(self) -> float:
        """Expected tokens per second of the round; 0 without requests."""
        return self.expected_tokens / self.expected_seconds if self.expected_seconds > 0 else 0.0

    @property
    def draft_tokens(self) -> int:
        return sum(self.lengths)
