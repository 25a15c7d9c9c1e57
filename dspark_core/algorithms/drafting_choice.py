"""For whom to draft at all: drafting costs time whether its tokens are verified or not.

Tokens that were looked up cost none, so for them less has to be expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, survival_matrix
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats


def drafting_order(gains: Floats, verified: Ints | Floats) -> Ints:
    """Requests by gain per verified token, the best first."""
    return np.argsort(-gains / np.maximum(verified, 1.0), kind="stable")


def worth_drafting(
    gains: Floats,
    verified: Ints | Floats,
    round_time: RoundTimeModel,
    context_tokens: int = 0,
    price: float = 0.0,
) -> Bools:
    """The set of requests to draft for that maximises tokens per second of later rounds -> [requests].

    gains [requests]: tokens a round commits beyond the bonus token when the request is drafted for;
    verified [requests]: how many draft tokens it then verifies. Sets are tried in the order of gain
    per verified token, from nobody to everybody. Uses T_draft, so apply it to later rounds only:
    this round's drafts are paid for. `price`: tokens that a second of the drafter's time is worth to
    others who share it, see `draft_price`.
    """
    count = len(gains)
    if count == 0:
        return np.zeros(0, dtype=np.bool_)
    order = drafting_order(gains, verified)
    tokens = count + np.concatenate(([0.0], np.cumsum(gains[order])))
    batch = count + np.concatenate(([0.0], np.cumsum(verified[order])))
    seconds = round_time.verify.table(count, batch, context_tokens) + round_time.overhead_table(count)
    seconds += round_time.loop.seconds(count)
    if price > 0.0:
        tokens[1:] -= price * round_time.draft.table(np.arange(1, count + 1, dtype=np.float64))
    best = int((tokens / seconds).argmax())
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[order[:best]] = True
    return chosen


def better_looked_up(
    lookups: Sequence[Sequence[float]],
    gains: Floats,
    verified: Floats,
    round_time: RoundTimeModel,
    context_tokens: int = 0,
    price: float = 0.0,
) -> Bools:
    """Whether looked-up tokens are expected to serve a request better than the drafter -> [requests].

    lookups: survival a_1, a_2, ... of each request's looked-up tokens, empty without; gains and
    verified [requests] as for `worth_drafting`. Compares tokens per second of a request's share of
    the round: an equal part of a round without drafts, an equal part of drafting for everybody, and
    what its own draft tokens add.
    """
    count = len(lookups)
    rows = survival_matrix(lookups)
    if rows.shape[1] == 0:
        return np.zeros(count, dtype=np.bool_)
    added = round_time.verify.table(count, count + np.arange(rows.shape[1] + 1), context_tokens)
    share = (added[0] + round_time.loop.seconds(count)) / count
    added = added - added[0]
    tokens = 1.0 + np.cumsum(np.maximum(rows, 0.0), axis=1)
    looked_up = (tokens / (share + added[1:])).max(axis=1)
    drafting = round_time.overhead_seconds(count) / count
    paid = price * round_time.draft.seconds(count) / count
    drafted = (1.0 + gains - paid) / (share + drafting + np.interp(verified, np.arange(len(added)), added))
    better: Bools = (rows[:, 0] >= 0.0) & (looked_up > np.maximum(drafted, 1.0 / share))
    return better
