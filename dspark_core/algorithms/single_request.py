"""What planners decide in rounds of one request, on numbers.

Such rounds are the shortest there are, and every array of one element takes longer than what it
decides. The rules are those of `plan_search` and `drafting_choice`, to which tests hold these.
"""

from __future__ import annotations

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
    expected, survival = 1.0, 1.0
    best, best_rate = 0, 1.0 / round_time.seconds(1, 1, context, drafted)
    for length, given in enumerate(request.survival, start=1):
        survival = min(survival, given)
        if not (survival >= 0.0 and given == given):  # impossible, or NaN: cut off here
            break
        expected += survival
        rate = expected / round_time.seconds(1, 1 + length, context, drafted)
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def worth_drafting_alone(
    gain: float, verified: float, round_time: RoundTimeModel, context_tokens: int = 0, price: float = 0.0
) -> bool:
    """`worth_drafting` of one request."""
    plain = 1.0 / round_time.seconds(1, 1, context_tokens)
    paid = price * round_time.draft.seconds(1)
    return (1.0 + gain - paid) / round_time.seconds(1, 1.0 + verified, context_tokens, 1) > plain
