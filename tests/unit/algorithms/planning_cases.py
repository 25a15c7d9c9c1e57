"""Rounds and step times for planner tests, and brute-force plans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hypothesis import strategies as st

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel

# Few distinct values, so that ties between requests and positions are common.
CONFIDENCE = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]) | st.floats(0, 1, width=32)
CONFIDENCES = st.lists(st.lists(CONFIDENCE, max_size=4), min_size=1, max_size=4)
FLOORS = st.none() | st.floats(0.05, 3.0)
MAX_TOKENS = 24


@st.composite
def jagged_times(draw: st.DrawFn) -> RoundTimeModel:
    """Arbitrary positive seconds for every number of batch tokens, plus drafting and network time."""
    # Cliffs and plateaus, with overheads small enough to keep them steep; otherwise every token pays.
    level = st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5]) | st.floats(0.2, 3.0)
    seconds = draw(st.lists(level, min_size=MAX_TOKENS, max_size=MAX_TOKENS))
    overhead = st.just(0.0) | st.floats(0.0, 0.5)
    draft = DraftTimeModel((1,), (draw(overhead),))
    verify = StepTimeModel.of_curve(range(1, MAX_TOKENS + 1), seconds)
    return RoundTimeModel(verify, draft, draw(overhead))


@st.composite
def linear_times(draw: st.DrawFn) -> RoundTimeModel:
    fixed, per_token = draw(st.floats(0.1, 2.0)), draw(st.floats(0.0, 1.0))
    tokens = (1, MAX_TOKENS)
    return RoundTimeModel(StepTimeModel.of_curve(tokens, [fixed + per_token * count for count in tokens]))


def times(*seconds: float) -> RoundTimeModel:
    """Times of rounds with 1, 2, ... batch tokens."""
    return RoundTimeModel(StepTimeModel.of_curve(range(1, len(seconds) + 1), seconds))


def requests_of(
    confidences: Sequence[Sequence[float]],
    floors: Sequence[float | None] | None = None,
    coupled: Sequence[bool] | None = None,
) -> list[PlanRequest]:
    count = len(confidences)
    return [
        PlanRequest(
            sequence_id=str(index),
            survival=survival_from_confidence(row),
            floor_tokens_per_second=floor,
            coupled=free,
        )
        for index, (row, floor, free) in enumerate(
            zip(confidences, floors or [None] * count, coupled or [False] * count, strict=True)
        )
    ]


def seconds_of(requests: Sequence[PlanRequest], lengths: Sequence[int], round_time: RoundTimeModel) -> float:
    drafted = sum(bool(request.survival) for request in requests)
    return round_time.seconds(len(requests), len(requests) + sum(lengths), 0, drafted)


def speeds_of(
    requests: Sequence[PlanRequest], lengths: Sequence[int], round_time: RoundTimeModel
) -> list[float]:
    seconds = seconds_of(requests, lengths, round_time)
    return [
        (1.0 + sum(request.survival[:length])) / seconds
        for request, length in zip(requests, lengths, strict=True)
    ]


def every_plan(requests: Sequence[PlanRequest]) -> list[tuple[int, ...]]:
    return list(product(*(range(len(request.survival) + 1) for request in requests)))


def satisfaction(speeds: Sequence[float], requests: Sequence[PlanRequest]) -> float:
    """Share of its floor that the worst-off request gets; 1 if all floors hold."""
    shares = [
        speed / request.floor_tokens_per_second
        for speed, request in zip(speeds, requests, strict=True)
        if request.floor_tokens_per_second is not None
    ]
    return min([1.0, *shares])
