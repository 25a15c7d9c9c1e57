"""The asynchronous scheduler (paper, section 5.2): a capacity from rounds that are over.

Searching past a drop is only harmless when it does not see the round it plans. So the number of
draft tokens to verify comes from a round at least two rounds old, by a search over the whole jagged
curve, and this round spends it on its own best tokens. A token's rank depends on itself and on
tokens drawn before it, never on what follows from it.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Ints, PlanBatch, rank
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.speed_floor import TOLERANCE, expected_tokens
from dspark_core.algorithms.step_surface import Floats
from dspark_core.errors import InvalidRequestError


def capacity(batch: PlanBatch, seconds: Floats) -> int:
    """Draft tokens in the best plan of a round that is over; floors are part of it."""
    everyone = np.ones(batch.requests, dtype=np.bool_)
    nothing = np.zeros(batch.requests, dtype=np.int64)
    return int(search(batch, seconds, nothing, everyone).sum())


def spend(batch: PlanBatch, tokens: int, seconds: Floats) -> Ints:
    """Lengths [requests] of this round: what floors need, then the best tokens up to `tokens`.

    `seconds[n]` of the round with n draft tokens; its length bounds the plan. What floors need is
    judged at the seconds of a round with `tokens`, known beforehand as they are; together floors may
    take more. Each takes one token after the other until it holds, none is looked at before its turn.
    """
    if tokens < 0:
        raise InvalidRequestError(f"capacity must be >= 0, got {tokens}", field="capacity")
    limit = len(seconds) - 1
    tokens = min(tokens, limit)
    needed = _needed(batch, float(seconds[tokens]), limit)
    left = max(tokens - int(needed.sum()), 0)
    return needed + rank(batch).without(needed).lengths(left, batch.requests)


def _needed(batch: PlanBatch, seconds: float, limit: int) -> Ints:
    """Position by position, as whether a position fits must not depend on later ones."""
    lengths = np.zeros(batch.requests, dtype=np.int64)
    if not batch.floors.any():
        return lengths
    for survival in batch.survival.T:
        behind = expected_tokens(batch, lengths) < batch.floors * seconds * (1.0 - TOLERANCE)
        grows = behind & (survival >= 0.0)
        if not grows.any() or int(lengths.sum() + grows.sum()) > limit:
            break
        lengths += grows
    return lengths
