"""Whether two cohorts of requests take turns: while the target computes one, the other is drafted for.

Drafting and the network then cost only what a pass of the other cohort does not hide. The price is that a
pass holds half of the requests: where weights are what takes time, two such passes take twice as long.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dspark_core.algorithms.drafting_choice import drafting_order, worth_drafting
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats
from dspark_core.records import MAX_COHORTS

COHORTS = MAX_COHORTS
LEAST_GAIN = 0.05
"""What turns have to promise over rounds of everybody: times are known to a few percent, and changing costs
a round in which drafts are waited for."""


def worth_turns(
    gains: Floats, verified: Floats, round_time: RoundTimeModel, context_tokens: int = 0
) -> float | None:
    """Seconds of the other cohort's pass where turns commit more tokens per second; None: they do not.

    gains and verified [requests] as for `worth_drafting`. Either way it is drafted for whom that pays. The
    cohorts are taken to be alike: every second request, in the order in which they gain by drafts.
    """
    if len(gains) < COHORTS or not gains.any():
        return None
    together = _tokens_per_second(gains, verified, round_time, context_tokens)
    half = drafting_order(gains, verified)[::COHORTS]
    count, context = len(half), context_tokens // COHORTS
    beside = round_time.seconds(count, count + float(verified[half].sum()), context)
    times = replace(round_time, beside_seconds=beside)
    apart = _tokens_per_second(gains[half], verified[half], times, context)
    return beside if apart > (1.0 + LEAST_GAIN) * together else None


def cycle_seconds(
    round_time: RoundTimeModel, requests: int, batch_tokens: int, context_tokens: int = 0, drafted: int = 0
) -> float:
    """Until each of so many requests has had its round, in turns; of all of them: tokens, context, drafts."""
    members, tokens, context, drafts = (
        -(-value // COHORTS) for value in (requests, batch_tokens, context_tokens, drafted)
    )
    beside = round_time.seconds(members, tokens, context)
    times = replace(round_time, beside_seconds=beside)
    return COHORTS * times.seconds(members, tokens, context, drafts)


def _tokens_per_second(
    gains: Floats, verified: Floats, round_time: RoundTimeModel, context_tokens: int
) -> float:
    """Of rounds that draft for whom it pays."""
    chosen, count = worth_drafting(gains, verified, round_time, context_tokens), len(gains)
    batch_tokens = count + float(verified[chosen].sum())
    drafted = int(np.count_nonzero(chosen))
    seconds = round_time.seconds(count, batch_tokens, context_tokens, drafted)
    return (count + float(gains[chosen].sum())) / seconds
