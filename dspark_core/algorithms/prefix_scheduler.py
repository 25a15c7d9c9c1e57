"""Chooses how many draft tokens of each request to verify (paper, Algorithm 1).

Survival a_j of a draft token is the estimated probability that it and all before it are accepted.
Tokens are admitted best first (see `plan_batch`), so every plan is made of prefixes.

Lossless rejection sampling requires that whether a token is verified does not depend on that token, and
the confidence after it already does. So either stop at the first admission that does not pay, as here,
or spend a capacity found from earlier rounds (`delayed_scheduler`); never search past a drop within one
round. Coupled and greedy requests are exempt (`plan_search.search`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, Ranking, running_sums
from dspark_core.algorithms.step_surface import Floats
from dspark_core.errors import InvalidRequestError

AT_FIRST = 256
"""Tokens considered before all of them are: most rounds stop earlier, and full prefix sums are slow."""


def admit_while_rising(ranking: Ranking, expected: float, seconds: Floats) -> int:
    """Algorithm 1 -> the number of best tokens to admit.

    `expected`: tokens of the round without drafts; `seconds[n]`: its time with n of them,
    at least one entry. `seconds` may be shorter than the ranking and then bounds the answer.
    """
    for most in (AT_FIRST, len(seconds)):
        count = rising(_throughput(ranking, expected, seconds[: most + 1]))
        if count < most:
            break
    return count


def rising(throughput: Floats) -> int:
    """Number of consecutive rises at the start; needs at least one value."""
    rises = throughput[1:] > throughput[:-1]
    return len(rises) if rises.all() else int(rises.argmin())


def one_more_pays(following: Floats, expected: float, seconds: Floats) -> bool:
    """Whether the most likely of the next tokens raises throughput; Algorithm 1 ends if not.

    `following`: survival of each request's next token; the rest as in `admit_while_rising`.
    """
    if len(seconds) < 2:
        return False
    best = float(following.max(initial=0.0))
    return (expected + best) / float(seconds[1]) > expected / float(seconds[0])


def following_values(batch: PlanBatch, lengths: Ints, candidates: Bools) -> Floats:
    """Survival of the token after each request's `lengths` -> [requests]; 0 or less if there is none.

    Only `candidates` [requests] may have more tokens.
    """
    block = batch.survival.shape[1]
    following = np.zeros(batch.requests)
    open_ = (candidates & (lengths < block)).nonzero()[0]
    following[open_] = batch.survival.ravel().take(open_ * block + lengths.take(open_))
    return following


def best_count(ranking: Ranking, expected: float, seconds: Floats) -> int:
    """The smallest count with the highest throughput; arguments as in `admit_while_rising`.

    For step times that rise in stairs, where early stopping gives up too soon. It looks ahead, so it is
    only for requests that may, or for past rounds.
    """
    return int(_throughput(ranking, expected, seconds).argmax())


def _throughput(ranking: Ranking, expected: float, seconds: Floats) -> Floats:
    """With none of the tokens, one, ... -> [tokens + 1], or as many as there are seconds."""
    tokens = running_sums(ranking.values[: len(seconds) - 1])
    tokens += expected
    tokens /= seconds[: len(tokens)]
    return tokens


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
