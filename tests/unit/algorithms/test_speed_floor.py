"""The vectorised serving of floors equals the token-by-token rule."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.plan_batch import PlanBatch, rank
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.prefix_scheduler import admit_while_rising
from dspark_core.algorithms.speed_floor import TOLERANCE, admit_floors, admit_within_floors, expected_tokens
from tests.unit.algorithms.planning_cases import CONFIDENCES, requests_of

FLOORS = st.none() | st.sampled_from([1.0, 2.0, 5.0]) | st.floats(0.05, 30.0)
SECONDS = st.one_of(
    st.floats(0.05, 1.0).map(lambda level: [level] * 24),
    st.tuples(st.floats(0.05, 1.0), st.floats(0.0, 0.05)).map(
        lambda pair: [pair[0] + pair[1] * count for count in range(24)]
    ),
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=24),
)


@st.composite
def batches(draw: st.DrawFn) -> PlanBatch:
    confidences = draw(CONFIDENCES)
    count = len(confidences)
    floors = draw(st.lists(FLOORS, min_size=count, max_size=count))
    granted = draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=count, max_size=count))
    requests = requests_of(confidences, floors)
    return PlanBatch.of(
        [
            PlanRequest(survival=r.survival, floor_tokens_per_second=r.floor_tokens_per_second, granted=g)
            for r, g in zip(requests, granted, strict=True)
        ]
    )


def reach(row: np.ndarray, position: int) -> float:
    """Expected tokens from `position` on if every conditional confidence equalled the highest so far."""
    before = np.concatenate(([1.0], row[:-1]))
    seen = [row[k] / before[k] if before[k] > 0 else 0.0 for k in range(position + 1)]
    likeliest, left = min(max(seen), 1.0), int((row >= 0).sum()) - position
    return sum(row[position] * likeliest**k for k in range(left))


def one_by_one(batch: PlanBatch, seconds: np.ndarray, judged_at: float) -> list[int]:
    """The literal rule: always serve the request that is furthest behind its floor."""
    lengths, closed, count = [0] * batch.requests, set(), 0
    while count < len(seconds) - 1:
        now, then = max(seconds[count], judged_at), max(seconds[count + 1], judged_at)
        waiting = []
        for index in np.flatnonzero(batch.floors):
            row, length = batch.survival[index], lengths[index]
            if index in closed or length >= int((row >= 0).sum()):
                continue
            expected = 1.0 + float(np.sum(row[:length]))
            waiting.append((-batch.floors[index] / expected, batch.granted[index], index, expected))
        if not waiting:
            break
        _, _, index, expected = min(waiting)
        promised = batch.floors[index] * now * (1.0 - TOLERANCE)
        if expected >= promised:
            break
        row, length = batch.survival[index], lengths[index]
        if (expected + row[length]) * now <= expected * then or expected + reach(row, length) < promised:
            closed.add(index)
            continue
        lengths[index] += 1
        count += 1
    return lengths


@given(batches(), SECONDS, st.booleans())
@settings(max_examples=300)
def test_floors_get_what_the_rule_gives_them(batch: PlanBatch, seconds: list[float], judged: bool) -> None:
    table = np.array(seconds)
    judged_at = float(table.max()) if judged else 0.0
    made, by_rule = admit_floors(batch, table, judged_at).tolist(), one_by_one(batch, table, judged_at)
    if made != by_rule:  # equally behind, in another order by rounding
        assert sum(made) == sum(by_rule)
        short = [
            np.sort(
                expected_tokens(batch, np.array(lengths))[batch.floors > 0] / batch.floors[batch.floors > 0]
            )
            for lengths in (made, by_rule)
        ]
        np.testing.assert_allclose(short[0], short[1], rtol=1e-6)


@given(batches(), SECONDS)
@settings(max_examples=200)
def test_where_no_token_pays_none_is_ranked_and_nothing_changes(
    batch: PlanBatch, seconds: list[float]
) -> None:
    table = np.array(seconds)
    start = admit_floors(batch, table)
    everyone = np.ones(batch.requests, dtype=np.bool_)
    made = admit_within_floors(batch, start, everyone, table)
    remaining = table[int(start.sum()) :]
    total = float(expected_tokens(batch, start).sum())
    if admit_while_rising(rank(batch).beyond(start), total, remaining) == 0:
        assert made.tolist() == start.tolist()
    assert (made >= start).all()


def best_after_best(
    batch: PlanBatch, lengths: list[int], seconds: np.ndarray, most: int | None
) -> list[int] | None:
    """The literal rule: admit the likeliest token until one does not pay or would break a floor. None if
    rounding decides whether one pays."""
    made, used = list(lengths), sum(lengths)
    expected = [1.0 + float(np.sum(row[:length])) for row, length in zip(batch.survival, made, strict=True)]
    promised = batch.floors * seconds[used] * (1.0 - TOLERANCE)
    holding = [tokens >= least for tokens, least in zip(expected, promised, strict=True)]
    while used < min(len(seconds) - 1, len(seconds) if most is None else most):
        tokens = [
            (-np.float32(row[length]), length, granted, index)
            for index, (row, length, granted) in enumerate(
                zip(batch.survival, made, batch.granted, strict=True)
            )
            if length < int((row >= 0).sum())
        ]
        if not tokens:
            break
        *_, index = min(tokens)
        gain = float(batch.survival[index, made[index]])
        total, now, then = sum(expected), seconds[used], seconds[used + 1]
        change = (total + gain) / then / (total / now) - 1.0
        if most is None and 0.0 < abs(change) < 1e-12:
            return None
        if most is None and change <= 0.0:
            break
        with_it = [value + gain * (place == index) for place, value in enumerate(expected)]
        if any(
            held and value * (1.0 + TOLERANCE) < floor * then
            for held, value, floor in zip(holding, with_it, batch.floors, strict=True)
        ):
            break
        made[index] += 1
        used += 1
        expected = with_it
    return made


@given(batches(), SECONDS, st.none() | st.integers(0, 12))
@settings(max_examples=400)
def test_throughput_goes_on_until_a_floor_that_holds_would_break(
    batch: PlanBatch, seconds: list[float], most: int | None
) -> None:
    """Holds whether or not the implementation has to rank all tokens."""
    table = np.array(seconds)
    start = admit_floors(batch, table)
    everyone = np.ones(batch.requests, dtype=np.bool_)
    made = admit_within_floors(batch, start, everyone, table, most=most)
    ruled = best_after_best(batch, start.tolist(), table, most)
    assume(ruled is not None)
    assert made.tolist() == ruled


def test_a_token_may_go_to_the_only_request_whose_floor_it_holds() -> None:
    """Another request's token would break the floor; its own, likelier one makes up for the longer round."""
    everyone = np.ones(2, dtype=np.bool_)
    seconds, start = np.array([1.0, 1.2, 1.5]), np.zeros(2, dtype=np.int64)
    for survival, lengths in (((0.5, 0.9), [0, 1]), ((0.9, 0.5), [0, 0])):
        batch = PlanBatch.of(
            [
                PlanRequest(survival=(survival[0],)),
                PlanRequest(survival=(survival[1],), floor_tokens_per_second=1.0),
            ]
        )
        assert admit_within_floors(batch, start, everyone, seconds).tolist() == lengths
