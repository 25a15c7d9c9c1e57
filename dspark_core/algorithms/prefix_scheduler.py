"""Chooses how many draft tokens of each request to verify (paper, Algorithm 1 and section 5.2).

Survival a_j of a draft token is the estimated probability that it and all before it are accepted;
request r's `survival[r]` is a_1, a_2, ... and never rises. Tokens are admitted best first: by
survival, then position, then request index. A token is looked at only after its predecessor in the
same request was admitted, so every plan is made of prefixes.

Lossless rejection sampling needs more: whether a token is verified must not depend on that token,
and the confidence after it already does. So either stop at the first admission that does not pay
(`PrefixScheduler`), or spend a capacity that was found from earlier rounds (`capacity_plan`); never
search past a drop within one round. No torch here, so the scheduler's image stays small.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dspark_core.errors import InvalidRequestError


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
