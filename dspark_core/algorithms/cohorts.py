"""Decides whether two cohorts of requests take turns: one is drafted for while the target verifies the other.

The target pass of the other cohort then hides drafting and network time. The price is that each
pass holds half of the requests: where a pass is bound by reading weights, two passes take twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dspark_core.algorithms.drafting_choice import drafting_order, worth_drafting
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats
from dspark_core.records import MAX_COHORTS

COHORTS = MAX_COHORTS
LEAST_GAIN = 0.05
"""Minimum relative gain of turns over common rounds: times are known to a few percent, and switching costs a
round that waits for its drafts."""


def worth_turns(
    gains: Floats,
    verified: Floats,
    round_time: RoundTimeModel,
    context_tokens: int = 0,
    price: float = 0.0,
) -> float | None:
    """Seconds of the other cohort's pass if turns commit more tokens per second; None: they do not.

    gains, verified [requests] and `price` as for `worth_drafting`, which chooses the requests to draft for
    either way. The cohorts are assumed to be every second request in drafting order.
    """
    if len(gains) < COHORTS or not gains.any():
        return None
    together = _Drafted.of(gains, verified, round_time, context_tokens, price)
    order, context = drafting_order(gains, verified), context_tokens // COHORTS
    halves = [order[0::COHORTS], order[1::COHORTS]]
    cohorts = []
    for half, other in (halves, halves[::-1]):
        beside = round_time.seconds(len(other), len(other) + float(verified[other].sum()), context)
        times = replace(round_time, beside_seconds=beside)
        chosen = _Drafted.of(gains[half], verified[half], times, context, price)
        cohorts.append(replace(chosen, wait_seconds=round_time.overhead_seconds(chosen.drafted)))
    if not any(one.drafted for one in cohorts):
        return None
    passes = sum(one.pass_seconds for one in cohorts)
    cycle = max(passes, *(one.wait_seconds + one.pass_seconds for one in cohorts))
    cycle = max(cycle, sum(round_time.draft.seconds(one.drafted) for one in cohorts))
    apart = sum(one.tokens for one in cohorts) / cycle
    rate = together.tokens / (together.wait_seconds + together.pass_seconds)
    return passes / COHORTS if apart > (1.0 + LEAST_GAIN) * rate else None


def cycle_seconds(
    round_time: RoundTimeModel, requests: int, batch_tokens: int, context_tokens: int = 0, drafted: int = 0
) -> float:
    """Time until each request has had its round, in turns. The counts are totals over both cohorts."""
    members, tokens, context, drafts = (
        -(-value // COHORTS) for value in (requests, batch_tokens, context_tokens, drafted)
    )
    beside = round_time.seconds(members, tokens, context)
    times = replace(round_time, beside_seconds=beside)
    return COHORTS * times.seconds(members, tokens, context, drafts)


@dataclass(frozen=True, slots=True)
class _Drafted:
    """A round that drafts for those requests for which it pays."""

    tokens: float
    """Less the value of the drafter's time to other verifiers."""
    drafted: int
    pass_seconds: float
    wait_seconds: float

    @classmethod
    def of(
        cls, gains: Floats, verified: Floats, round_time: RoundTimeModel, context_tokens: int, price: float
    ) -> _Drafted:
        chosen, count = worth_drafting(gains, verified, round_time, context_tokens, price), len(gains)
        drafted = int(np.count_nonzero(chosen))
        return cls(
            tokens=count + float(gains[chosen].sum()) - price * round_time.draft.seconds(drafted),
            drafted=drafted,
            pass_seconds=round_time.seconds(count, count + float(verified[chosen].sum()), context_tokens),
            wait_seconds=round_time.overhead_seconds(drafted),
        )
