"""Planner decisions for rounds of a single request, in scalar arithmetic.

These are the shortest rounds, and numpy calls on arrays of one element take longer than the decision
itself. The rules are those of `plan_search` and `drafting_choice`; tests hold the two to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.records import DraftOrigin


def decides_alone(request: PlanRequest) -> bool:
    """Whether `length_alone` applies: the request may look ahead and has no speed floor."""
    return request.coupled and request.floor_tokens_per_second is None


def length_alone(request: PlanRequest, round_time: RoundTimeModel) -> int:
    """The verify length with the most tokens per second; the shortest on ties."""
    drafted = int(request.origin is not DraftOrigin.LOOKUP)
    context = request.context_tokens
    best, best_rate = 0, 1.0 / round_time.seconds(1, 1, context, drafted)
    for length, expected in enumerate(_expected_tokens(request.survival), start=1):
        rate = expected / round_time.seconds(1, 1 + length, context, drafted)
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def worth_drafting_alone(
    gain: float,
    verified: float,
    round_time: RoundTimeModel,
    context_tokens: int = 0,
    price: float = 0.0,
    *,
    least_gain: float = 0.0,
) -> bool:
    """`worth_drafting` for one request; `least_gain`: required relative gain over plain decoding."""
    plain = (1.0 + least_gain) / round_time.seconds(1, 1, context_tokens)
    paid = price * round_time.draft.seconds(1)
    return (1.0 + gain - paid) / round_time.seconds(1, 1.0 + verified, context_tokens, 1) > plain


def better_looked_up_alone(
    lookup: Sequence[float],
    gain: float,
    verified: float,
    round_time: RoundTimeModel,
    context_tokens: int = 0,
    price: float = 0.0,
    *,
    least_gain: float = 0.0,
) -> bool:
    """`better_looked_up` for one request; `least_gain`: required relative gain of the draft over them."""
    expected = list(_expected_tokens(lookup))
    if not expected:
        return False
    paid = price * round_time.draft.seconds(1)
    # The draft's verify length is capped at the looked-up length, as in `better_looked_up`.
    longest = min(verified, float(len(expected)))
    step = round_time.seconds(1, 1.0 + longest, context_tokens)
    drafted = (1.0 + gain - paid) / ((1.0 + least_gain) * (step + round_time.overhead_seconds(1)))
    other = max(drafted, 1.0 / round_time.seconds(1, 1, context_tokens))
    # Lazy: usually one of the first lengths qualifies, and each one costs.
    return any(
        tokens / round_time.seconds(1, 1 + length, context_tokens) > other
        for length, tokens in enumerate(expected, start=1)
    )


def _expected_tokens(survival: Sequence[float]) -> Iterator[float]:
    """Expected tokens with 1, 2, ... drafts, bonus token included; stops at the first invalid survival."""
    expected, lowest = 1.0, 1.0
    for given in survival:
        lowest = min(lowest, given)
        if not (lowest >= 0.0 and given == given):  # NaN differs from itself
            return
        expected += lowest
        yield expected
