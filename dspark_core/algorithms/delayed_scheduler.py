"""The asynchronous scheduler (paper, section 5.2): a capacity from rounds that are over.

Searching past a drop is only harmless when it does not see the round it plans. So the number of
draft tokens to verify comes from a round at least two rounds old, by a search over the whole jagged
curve, and this round spends it on its own best tokens. A token's rank depends on itself and on
tokens drawn before it, never on what follows from it.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Ints, PlanBatch, Ranking, rank
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.prefix_scheduler import best_count
from dspark_core.algorithms.speed_floor import admit_floors, admit_within_floors
from dspark_core.algorithms.step_surface import Floats
from dspark_core.errors import InvalidRequestError


def capacity(batch: PlanBatch, seconds: Floats, ranking: Ranking | None = None) -> int:
    """Draft tokens in the best plan of a round that is over; floors are part of it. `ranking`: of the batch,
    where it is known already."""
    if batch.has_floors:
        return int(search(batch, seconds, ranking=ranking).sum())
    return best_count(ranking or rank(batch), float(batch.requests), seconds)


def spend(batch: PlanBatch, tokens: int, seconds: Floats, ranking: Ranking | None = None) -> Ints:
    """Lengths [requests] of this round, at most `tokens` in all: what floors need, then the best others.

    `seconds[n]` of the round with n draft tokens; its length bounds the plan. Floors are judged at the
    seconds of a round with `tokens`, known beforehand as they are. The rest is not spent where a floor
    that holds would break, which happens when some were out of reach at those seconds.
    """
    if tokens < 0:
        raise InvalidRequestError(f"capacity must be >= 0, got {tokens}", field="capacity")
    tokens = min(tokens, len(seconds) - 1)
    if not batch.has_floors:
        return (ranking or rank(batch)).lengths(tokens)
    start = admit_floors(batch, seconds[: tokens + 1], judged_at=float(seconds[tokens]))
    everyone = np.ones(batch.requests, dtype=np.bool_)
    return admit_within_floors(batch, start, everyone, seconds, most=tokens, ranking=ranking)
