"""The asynchronous scheduler (paper, section 5.2): takes a capacity from past rounds and spends it.

Searching past a drop in throughput is safe only if the search does not see the round being planned. So the
number of draft tokens to verify comes from a round at least two rounds old, by a search over the whole jagged
curve, and the current round spends it on its best tokens. A token's rank depends on itself and on
tokens drawn before it, never on later ones.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Ints, PlanBatch, Ranking, rank
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.prefix_scheduler import best_count
from dspark_core.algorithms.speed_floor import admit_floors, admit_within_floors
from dspark_core.algorithms.step_surface import Floats
from dspark_core.errors import InvalidRequestError

MIN_PLAN_AGE_ROUNDS = 2
"""A capacity must come from confidences at least this many rounds old (paper, section 5.2)."""


def capacity(batch: PlanBatch, seconds: Floats, ranking: Ranking | None = None) -> int:
    """Draft tokens in the best plan of a past round, speed floors included. `ranking`: that of `batch`, if
    already computed."""
    if batch.has_floors:
        return int(search(batch, seconds, ranking=ranking).sum())
    return best_count(ranking or rank(batch), float(batch.requests), seconds)


def spend(batch: PlanBatch, tokens: int, seconds: Floats, ranking: Ranking | None = None) -> Ints:
    """Verify lengths [requests] of this round, at most `tokens` in total: speed floors first, then the best.

    `seconds[n]` is the round's time with n draft tokens; its length bounds the plan. Floors are judged at the
    time of a round with `tokens`, which is known in advance. The rest is not spent where it would break a
    floor that holds, which can happen if some floors were out of reach at that time.
    """
    if tokens < 0:
        raise InvalidRequestError(f"capacity must be >= 0, got {tokens}", field="capacity")
    tokens = min(tokens, len(seconds) - 1)
    if not batch.has_floors:
        return (ranking or rank(batch)).lengths(tokens)
    start = admit_floors(batch, seconds[: tokens + 1], judged_at=float(seconds[tokens]))
    everyone = np.ones(batch.requests, dtype=np.bool_)
    return admit_within_floors(batch, start, everyone, seconds, most=tokens, ranking=ranking)
