"""Chooses looked-up tokens over the drafter's by tokens per second, draft price included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.drafting_choice import better_looked_up
from dspark_core.algorithms.loop_time import LoopTimeModel
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel

TIMES = RoundTimeModel(
    StepTimeModel.of_curve((1, 16), (0.004, 0.008)), DraftTimeModel((1, 8), (0.002, 0.006))
)
LINEAR = StepTimeModel.of_curve((1, 1000), (0.004, 0.204))
BLOCK = tuple(0.8**k for k in range(1, 8))


def alone(lookup: tuple[float, ...], gain: float, verified: float, price: float = 0.0) -> bool:
    return bool(better_looked_up([lookup], np.array([gain]), np.array([verified]), TIMES, 0, price)[0])


def test_the_same_tokens_are_better_for_nothing() -> None:
    assert alone(BLOCK, gain=sum(BLOCK), verified=len(BLOCK))


def test_a_drafter_that_brings_far_more_is_worth_its_time() -> None:
    assert not alone((0.3,), gain=4.0, verified=6.0)


def test_drafter_time_that_others_need_is_not_taken_for_little() -> None:
    assert not alone((0.6, 0.4), gain=2.5, verified=4.0)
    assert alone((0.6, 0.4), gain=2.5, verified=4.0, price=2000.0)


def test_a_token_that_costs_more_than_it_brings_is_not_preferred_to_nothing() -> None:
    assert not alone((0.01,), gain=0.0, verified=0.0)


@given(st.lists(st.floats(0.0, 1.0), max_size=8), st.floats(0.0, 6.0), st.floats(0.0, 7.0))
def test_longer_looked_up_blocks_are_never_worse(rates: list[float], gain: float, verified: float) -> None:
    block = tuple(np.cumprod(rates).tolist())
    assert alone(block, gain, verified) >= alone(block[: len(block) // 2], gain, verified)
    assert not alone((), gain, verified)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    st.integers(1, 6),
    st.floats(0.0, 6.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.01),
    st.sampled_from([0.0, 50.0]),
)
def test_of_equal_requests_all_look_up_where_that_makes_the_faster_round(
    rates: list[float], count: int, gain: float, share: float, loop: float, price: float
) -> None:
    """On linear hardware, a request's share of the round is exact, so whole rounds can be compared."""
    times = replace(TIMES, verify=LINEAR, network_seconds=0.001, loop=LoopTimeModel(loop, loop / 8))
    block = np.cumprod(rates)
    verified = share * len(block)
    plain = count / times.seconds(count, count)
    drafted = count * (1.0 + gain) - price * times.draft.seconds(count)
    drafted /= times.seconds(count, count * (1.0 + verified), 0, count)
    looked_up = max(
        count * (1.0 + block[:length].sum()) / times.seconds(count, count * (1 + length))
        for length in range(1, len(block) + 1)
    )
    better = better_looked_up(
        [block.tolist()] * count, np.full(count, gain), np.full(count, verified), times, 0, price
    )
    if abs(looked_up / max(plain, drafted) - 1.0) > 1e-9:
        assert better.tolist() == [looked_up > max(plain, drafted)] * count
