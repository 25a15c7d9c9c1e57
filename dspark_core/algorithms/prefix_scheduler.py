"""Chooses how many draft tokens of each request to verify (paper, Algorithm 1).

Survival a_j of a draft token is the estimated probability that it and all before it are accepted.
Tokens are admitted best first (see `plan_batch`), so every plan is made of prefixes.

Lossless rejection sampling needs more: whether a token is verified must not depend on that token,
and the confidence after it already does. So stop at the first admission that does not pay, here, or
spend a capacity found from earlier rounds (`delayed_scheduler`); never search past a drop within one
round. Requests whose acceptance is no matter of chance are free of this (`speed_floor.search`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dspark_core.algorithms.plan_batch import Ranking
from dspark_core.algorithms.step_surface import Floats
from dspark_core.errors import InvalidRequestError


def admit_while_rising(ranking: Ranking, expected: float, seconds: Floats) -> int:
    """Algorithm 1 -> how many of the best tokens to admit.

    `expected`: weighted tokens of the round without them; `seconds[n]`: of the round with n of them,
    at least one entry; it may be shorter than the ranking, which then bounds the answer.
    """
    values = ranking.values[: len(seconds) - 1]
    throughput = (expected + np.concatenate(([0.0], np.cumsum(values)))) / seconds[: len(values) + 1]
    rises = throughput[1:] > throughput[:-1]
    return len(rises) if rises.all() else int(rises.argmin())


def best_count(ranking: Ranking, expected: float, seconds: Floats) -> int:
    """The count with the highest throughput of all, the smallest such; arguments as above.

    For step times that rise in stairs, where stopping early gives up too soon. It looks ahead: only
    for requests that may, or for rounds that are over.
    """
    values = ranking.values[: len(seconds) - 1]
    throughput = (expected + np.concatenate(([0.0], np.cumsum(values)))) / seconds[: len(values) + 1]
    return int(throughput.argmax())


def survival_from_confidence(confidences: Sequence[float]) -> tuple[float, ...]:
    """Conditional confidences c_1, c_2, ... of one request -> survival a_k = c_1 * ... * c_k."""
    survival: list[float] = []
    product = 1.0
    for position, confidence in enumerate(confidences, start=1):
        if not 0.0 <= confidence <= 1.0:  # NaN fails too
            raise InvalidRequestError(
                f"confidence of draft position {position} must be in [0, 1], got {confidence}",
                field="confidences",
            )
        product *= confidence
        survival.append(product)
    return tuple(survival)


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Verify length of each request, and the tokens per second expected of the round."""

    lengths: tuple[int, ...]
    throughput: float


class PrefixScheduler:
    """Algorithm 1 with early stopping."""

    def __init__(self, steps_per_second: Callable[[int], float]) -> None:
        """`steps_per_second` of a target pass over so many batch tokens: the paper's SPS(B)."""
        self._steps_per_second = steps_per_second

    def plan(self, survival: Sequence[Sequence[float]], caps: Sequence[int] | None = None) -> PrefixPlan:
        """Admits tokens best first until one does not raise expected throughput.

        `caps` bounds each request's length; it must not depend on this round's draft tokens.
        """
        if not survival:
            return PrefixPlan((), 0.0)
        lengths = [0] * len(survival)
        batch_tokens, expected = len(survival), float(len(survival))
        best = expected * self._steps_per_second(batch_tokens)
        for token_survival, position, request in _best_first(survival, caps):
            batch_tokens, expected = batch_tokens + 1, expected + token_survival
            throughput = expected * self._steps_per_second(batch_tokens)
            if not throughput > best:
                break
            best, lengths[request] = throughput, position
        return PrefixPlan(tuple(lengths), best)


def capacity_plan(
    survival: Sequence[Sequence[float]], capacity: int, caps: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Verify lengths that admit the `capacity` draft tokens most likely to survive.

    Lossless when the capacity comes from earlier rounds: a token's rank depends only on itself and
    on tokens drawn before it, not on what follows from it.
    """
    if capacity < 0:
        raise InvalidRequestError(f"capacity must be >= 0, got {capacity}", field="capacity")
    lengths = [0] * len(survival)
    for _, position, request in islice(_best_first(survival, caps), capacity):
        lengths[request] = position
    return tuple(lengths)


def unconstrained_capacity(
    survival: Sequence[Sequence[float]], steps_per_second: Callable[[int], float]
) -> int:
    """Draft tokens that maximise expected throughput over all counts, the smallest such count.

    For step rates that fall in stairs, where stopping early gives up too soon. Only for survival of
    *earlier* rounds: applied to the round it plans, it biases the output (paper, appendix A).
    """
    if not survival:
        return 0
    batch_tokens, expected = len(survival), float(len(survival))
    best, capacity = expected * steps_per_second(batch_tokens), 0
    for count, (token_survival, _, _) in enumerate(_best_first(survival, None), start=1):
        expected += token_survival
        throughput = expected * steps_per_second(batch_tokens + count)
        if throughput > best:
            best, capacity = throughput, count
    return capacity


def _best_first(
    survival: Sequence[Sequence[float]], caps: Sequence[int] | None
) -> Iterator[tuple[float, int, int]]:
    """Yields (survival, position, request), best first; position j is the j-th token, from 1.

    Only the next token of each request is in the heap: a later one is not even read before.
    """
    limits = [len(row) for row in survival]
    if caps is not None:
        limits = [min(limit, cap) for limit, cap in zip(limits, caps, strict=True)]
    heap = [(-row[0], 1, r) for r, row in enumerate(survival) if limits[r] >= 1]
    heapq.heapify(heap)
    while heap:
        negative, position, request = heap[0]
        yield -negative, position, request
        if position < limits[request]:
            heapq.heapreplace(heap, (-survival[request][position], position + 1, request))
        else:
            heapq.heappop(heap)
