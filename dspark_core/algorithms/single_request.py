"""What planners decide in rounds of one request, on numbers.

Such rounds are the shortest there are, and every array of one element takes longer than what it
decides. The rules are those of `plan_search` and `drafting_choice`, to which tests hold these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.records import DraftOrigin


def decides_alone(request: PlanRequest) -> bool:
    """Whether `length_alone` is for it: the best length there is, and no floor to hold."""
    return request.coupled and request.floor_tokens_per_second is None


def length_alone(request: PlanRequest, round_time: RoundTimeModel) -> int:
    """The verify length with most tokens per second; of equal ones the shortest."""
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
    """`worth_drafting` of one request; `least_gain`: over plain decoding, as a share of its speed."""
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
) -> bool:
    """`better_looked_up` of one request."""
    expected = list(_expected_tokens(lookup))
    if not expected:
        return False
    paid = price * round_time.draft.seconds(1)
    # What a draft verifies is compared within the lengths that were looked up.
    longest = min(verified, float(len(expected)))
    step = round_time.seconds(1, 1.0 + longest, context_tokens)
    drafted = (1.0 + gain - paid) / (step + round_time.overhead_seconds(1))
    other = max(drafted, 1.0 / round_time.seconds(1, 1, context_tokens))
    # Mostly one of the first lengths is, and each one costs.
    return any(
        tokens / round_time.seconds(1, 1 + length, context_tokens) > other
        for length, tokens in enumerate(expected, start=1)
    )


def _expected_tokens(survival: Sequence[float]) -> Iterator[float]:
    """Of 1, 2, ... draft tokens, the bonus token included; survival is cut off where it is impossible."""
    expected, lowest = 1.0, 1.0
    for given in survival:
        lowest = min(lowest, given)
        if not (lowest >= 0.0 and given == given):  # NaN differs from itself
            return
        expected += lowest
        yield expected
