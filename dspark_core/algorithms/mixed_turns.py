"""Plans mixed rounds without speed floors on a single ranking.

Requests that may look ahead and those that may not are planned alternately (see `planner`). A plan takes the
best tokens of each kind, so it is just two counts, and its expected tokens are two prefix sums computed once.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Ints, PlanBatch, rank, running_sums
from dspark_core.algorithms.prefix_scheduler import admit_while_rising, rising
from dspark_core.algorithms.step_surface import Floats


def take_turns(batch: PlanBatch, seconds: Floats) -> Ints:
    """Verify lengths [requests]; `seconds[n]` is the time of a round with n draft tokens.

    Algorithm 1 over all requests decides how many tokens of the careful requests, which may not look ahead,
    are admitted; a search decides how many tokens of the free ones go best with those. Where the free tokens
    have climbed a stair of the step time, it may hold more careful tokens, and vice versa, so both steps are
    repeated once from there.
    """
    ranking, alone = rank(batch), float(batch.requests)
    requests = ranking.requests
    is_free = batch.coupled.take(requests)
    free, careful = is_free.nonzero()[0], (~is_free).nonzero()[0]
    free_tokens = running_sums(ranking.values.take(free))
    careful_tokens = running_sums(ranking.values.take(careful))
    first = admit_while_rising(ranking, alone, seconds)
    admitted = first - int(np.count_nonzero(is_free[:first]))
    found = int(_throughput(alone + careful_tokens[admitted] + free_tokens, seconds[admitted:]).argmax())
    tokens = alone + free_tokens[found] + careful_tokens[admitted:]
    more = admitted + rising(_throughput(tokens, seconds[admitted + found :]))
    if more > admitted:
        found = int(_throughput(alone + careful_tokens[more] + free_tokens, seconds[more:]).argmax())
    chosen = np.concatenate((careful[:more], free[:found]))
    return np.bincount(requests.take(chosen), minlength=batch.requests)


def _throughput(tokens: Floats, seconds: Floats) -> Floats:
    """Over the counts that both arrays cover."""
    known = min(len(tokens), len(seconds))
    return tokens[:known] / seconds[:known]
