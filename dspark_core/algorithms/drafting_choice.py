"""For whom to draft at all: drafting costs time whether its tokens are verified or not."""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints
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
