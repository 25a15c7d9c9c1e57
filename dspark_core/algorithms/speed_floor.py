"""Speed floors: a request's expected tokens per round over the round's seconds is at least its floor.

Floors come first, throughput after. Everything here decides token by token and looks at no token
before it decides on it, so it may plan rejection sampling. `plan_search` knows floors too, for
requests that may look ahead.
"""

from __future__ import annotations

import heapq

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch
from dspark_core.algorithms.step_surface import Floats

TOLERANCE = 1e-9
"""Relative: a floor that holds exactly must not fail by rounding."""


def expected_tokens(batch: PlanBatch, lengths: Ints) -> Floats:
    """Tokens each request commits in expectation, the bonus token included -> [requests]."""
    if batch.survival.shape[1] == 0:
        return np.ones(batch.requests)
    admitted = np.arange(batch.survival.shape[1]) < lengths[:, None]
    tokens: Floats = 1.0 + np.where(admitted, batch.survival, 0.0).sum(axis=1)
    return tokens


def unmet_floors(batch: PlanBatch, lengths: Ints, seconds: float) -> tuple[int, ...]:
    short = expected_tokens(batch, lengths) < batch.floors * seconds * (1.0 - TOLERANCE)
    return tuple(int(index) for index in short.nonzero()[0])


def admit_floors(batch: PlanBatch, seconds: Floats) -> Ints:
    """Tokens that floors need -> lengths [requests]; `seconds[n]` of the round with n draft tokens.

    The request that is furthest behind goes first. It stops when its floor holds, when its tokens
    end, or when one more would not make it any faster.
    """
    lengths = np.zeros(batch.requests, dtype=np.int64)
    expected = np.ones(batch.requests)
    open_requests = set(batch.floors.nonzero()[0].tolist())
    count = 0
    while open_requests and count + 1 < len(seconds):
        now, then = float(seconds[count]), float(seconds[count + 1])
        behind = max(
            open_requests,
            key=lambda r: (batch.floors[r] * now / expected[r], -float(batch.granted[r]), -r),
        )
        if expected[behind] >= batch.floors[behind] * now:
            break  # the furthest behind is not behind
        length = lengths[behind]
        gain = batch.survival[behind, length] if length < batch.survival.shape[1] else -1.0
        if gain < 0.0 or (expected[behind] + gain) * now <= expected[behind] * then:
            open_requests.discard(behind)
            continue
        lengths[behind] += 1
        expected[behind] += gain
        count += 1
    return lengths


def admit_within_floors(batch: PlanBatch, lengths: Ints, candidates: Bools, seconds: Floats) -> Ints:
    """Algorithm 1 that goes on from `lengths` and also stops where a floor that holds would break.

    Adds tokens of `candidates` [requests] only. Sequential: what a floor allows changes with the
    tokens of its own request.
    """
    lengths, count = lengths.copy(), int(lengths.sum())
    expected = expected_tokens(batch, lengths)
    holding = (batch.floors > 0) & (expected >= batch.floors * seconds[count] * (1.0 - TOLERANCE))
    total = float((expected * batch.weights).sum())
    entries = (_entry(batch, r, int(lengths[r])) for r in candidates.nonzero()[0].tolist())
    heap = [entry for entry in entries if entry is not None]
    heapq.heapify(heap)
    while heap and count + 1 < len(seconds):
        value, _, _, request = heap[0]
        if not (total - value) * seconds[count] > total * seconds[count + 1]:
            break
        raised = expected[request] + batch.survival[request, lengths[request]]
        if holding.any() and seconds[count + 1] > _longest(batch, expected, holding, request, raised):
            break
        total, count = total - value, count + 1
        expected[request] = raised
        lengths[request] += 1
        following = _entry(batch, request, int(lengths[request]))
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, following)
    return lengths


def _longest(batch: PlanBatch, expected: Floats, holding: Bools, request: int, raised: float) -> float:
    """Seconds a round may take for every floor that holds, once `request` expects `raised` tokens."""
    after = expected.copy()
    after[request] = raised
    return float((after[holding] / batch.floors[holding]).min()) * (1.0 + TOLERANCE)


def _entry(batch: PlanBatch, request: int, length: int) -> tuple[float, int, float, int] | None:
    """Heap entry of a request's next token; None when there is none."""
    if length >= batch.survival.shape[1] or batch.survival[request, length] < 0.0:
        return None
    value = float(batch.survival[request, length] * batch.weights[request])
    return (-value, length, float(batch.granted[request]), request)
