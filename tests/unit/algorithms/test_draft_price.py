"""The price of drafter time: zero while there is enough, otherwise what keeps the most useful drafts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.draft_price import (
    FILLINGS,
    FRESH_SECONDS,
    HALF_LIFE_SECONDS,
    LEEWAY,
    DraftDemand,
    draft_prices,
    faded,
)
from dspark_core.algorithms.drafting_choice import worth_drafting
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel

PLAIN = RoundTimeModel(
    StepTimeModel.of_curve((1, 128, 512), (0.02, 0.02, 0.06)), DraftTimeModel((1, 64), (0.004, 0.0103))
)


@st.composite
def round_times(draw: st.DrawFn) -> RoundTimeModel:
    fixed, per_token = draw(st.floats(0.005, 0.05)), draw(st.floats(0.0, 0.001))
    first = draw(st.floats(0.0005, 0.02))
    verify = StepTimeModel.of_curve((1, 400), (fixed, fixed + 400 * per_token))
    return RoundTimeModel(verify, DraftTimeModel((1, 32), (first, first + draw(st.floats(0.0, 0.02)))))


@st.composite
def demands(draw: st.DrawFn) -> DraftDemand:
    count = draw(st.integers(1, 12))
    verified = np.array(draw(st.lists(st.floats(0.0, 7.0), min_size=count, max_size=count)))
    shares = np.array(draw(st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count)))
    return DraftDemand(
        gains=verified * shares,
        verified=verified,
        round_time=draw(round_times()),
        queue_seconds=draw(st.just(0.0) | st.floats(0.0, 0.01)),
        drafting=draw(st.booleans()),
        used=draw(st.just(0.0) | st.floats(0.0, 0.5)),
    )


def demand(gain: float, requests: int = 8) -> DraftDemand:
    return DraftDemand(gains=np.full(requests, gain), verified=np.full(requests, 2 * gain), round_time=PLAIN)


def chosen(one: DraftDemand, price: float) -> np.ndarray:
    """The requests a verifier drafts for, by its own estimates."""
    way = one.round_time.network_seconds + one.queue_seconds
    times = replace(one.round_time, network_seconds=way)
    return worth_drafting(one.gains, one.verified, times, one.context_tokens, price)


def load(one: DraftDemand, price: float) -> float:
    """Share of the drafter's time that it uses at this price."""
    picked = chosen(one, price)
    count, drafted = len(picked), int(picked.sum())
    way = one.round_time.network_seconds + one.queue_seconds
    times = replace(one.round_time, network_seconds=way)
    batch = count + float(one.verified[picked].sum())
    seconds = float(times.verify.table(count, np.array([batch]), 0)[0]) + times.overhead_seconds(drafted)
    return one.round_time.draft.seconds(drafted) / seconds


def test_nobody_pays_for_a_drafter_of_his_own() -> None:
    assert draft_prices([demand(1.0)]).of == (0.0,)
    assert draft_prices([]).of == ()


@given(st.lists(demands(), min_size=1, max_size=5))
@settings(max_examples=60)
def test_enough_for_all_costs_nothing(several: list[DraftDemand]) -> None:
    # Drafts so short that all of them use less than the smallest share that is ever handed out.
    quick = [
        replace(one, round_time=replace(one.round_time, draft=DraftTimeModel((1,), (FILLINGS[0] * 0.001,))))
        for one in several
    ]
    assert sum(load(one, 0.0) for one in quick) < FILLINGS[0]
    found = draft_prices(quick)
    assert (found.price, set(found.of)) == (0.0, {0.0})


@given(demands(), st.floats(0.0, 5000.0), st.floats(0.0, 5000.0))
@settings(max_examples=100)
def test_a_higher_price_never_makes_a_verifier_ask_for_more(one: DraftDemand, a: float, b: float) -> None:
    assert load(one, max(a, b)) <= load(one, min(a, b)) + 1e-12


@given(st.lists(demands(), min_size=2, max_size=8))
@settings(max_examples=100)
def test_what_verifiers_choose_at_their_prices_fits(several: list[DraftDemand]) -> None:
    found = draft_prices(several)
    assert found.load <= FILLINGS[-1] + 1e-9 or found.price == 0.0
    if found.price > 0.0:
        asked = sum(load(one, price) for one, price in zip(several, found.of, strict=True))
        assert asked <= found.load * (1.0 + LEEWAY) + 1e-9


@given(st.lists(demands(), min_size=2, max_size=8))
@settings(max_examples=60)
def test_the_best_requests_of_a_verifier_keep_their_drafts(several: list[DraftDemand]) -> None:
    for one, price in zip(several, draft_prices(several).of, strict=True):
        picked = chosen(one, price)
        yields = one.gains / np.maximum(one.verified, 1.0)
        if picked.any() and not picked.all():
            assert yields[picked].min() >= yields[~picked].max()
        # A price never makes a verifier start drafting. One that drafts may draft for more requests: if
        # another request costs the drafter nothing, the longer round uses a smaller share of its time.
        assert chosen(one, 0.0).any() or not picked.any()


def test_a_pass_that_costs_the_drafter_no_more_is_shared_with_who_would_not_pay_alone() -> None:
    """A counterexample to an earlier version of the property above, found by hypothesis."""
    steps = StepTimeModel.of_curve((1, 400), (0.03125, 0.3228233898430531))
    times = RoundTimeModel(steps, DraftTimeModel((1, 32), (0.001953125, 0.001953125)))
    one = DraftDemand(
        gains=np.array([0.0, 0.0, 3.0, 0.125, 0.0]),
        verified=np.array([0.0, 0.0, 3.0, 1.0, 0.0]),
        round_time=times,
    )
    free, priced = chosen(one, 0.0), chosen(one, 1000.0)
    assert (free.sum(), priced.sum()) == (1, 2)
    assert load(one, 1000.0) < load(one, 0.0)


@given(st.lists(demands(), min_size=2, max_size=6), st.sampled_from(FILLINGS), st.sampled_from(FILLINGS))
@settings(max_examples=60)
def test_less_to_hand_out_never_makes_it_cheaper(
    several: list[DraftDemand], one: float, other: float
) -> None:
    # The same queue in both, so that they differ only in the share handed out.
    calm = [replace(each, drafting=False, round_time=replace(each.round_time)) for each in several]
    scarce, ample = sorted((one, other))
    tight, wide = draft_prices(calm, (scarce,)), draft_prices(calm, (ample,))
    assert wide.load <= ample or wide.price == 0.0
    if wide.price > 0.0:
        assert tight.price > 0.0


def test_prices_appear_as_verifiers_come_and_the_drafter_stays_usable() -> None:
    prices = [draft_prices([demand(0.8)] * count) for count in range(1, 33)]
    assert prices[0].price == 0.0
    assert prices[-1].price > 0.0
    first = next(index for index, one in enumerate(prices) if one.price > 0.0)
    assert all(one.price > 0.0 for one in prices[first:])
    plain = 8 / PLAIN.seconds(8, 8)
    gains = [one.tokens_per_second - plain * count for count, one in enumerate(prices, 1)]
    # A later verifier waits behind others and leaves them most of their gain.
    assert all(later >= 0.7 * max(gains[: index + 1]) for index, later in enumerate(gains))


@pytest.mark.parametrize("poor", [0.4, 0.6, 0.8])
def test_verifiers_whose_drafts_bring_little_lose_them_first(poor: float) -> None:
    several = [demand(1.2)] * 3 + [demand(poor)] * 9
    found = draft_prices(several)
    assert found.price > 0.0
    assert all(chosen(one, price).any() for one, price in zip(several[:3], found.of, strict=False))
    drafting = [bool(chosen(one, price).any()) for one, price in zip(several, found.of, strict=True)]
    assert not all(drafting[3:])


def test_equal_verifiers_are_told_apart_and_whoever_drafts_goes_on() -> None:
    several = [replace(demand(0.8), drafting=index in (4, 7)) for index in range(12)]
    found = draft_prices(several)
    drafting = [bool(chosen(one, price).any()) for one, price in zip(several, found.of, strict=True)]
    assert drafting[4]
    assert drafting[7]
    assert 0 < sum(drafting) < len(drafting)


def test_the_price_is_what_the_first_refused_draft_would_have_brought() -> None:
    """The first draft takes a sixth of the drafter's time; a second would exceed the share."""
    filling = 0.2
    times = replace(PLAIN, draft=DraftTimeModel((1, 2), (0.004, 0.006)))
    two = DraftDemand(gains=np.array([1.0, 0.3]), verified=np.array([1.0, 1.0]), round_time=times)
    other = DraftDemand(gains=np.array([0.05]), verified=np.array([1.0]), round_time=times)
    found = draft_prices([two, other], (filling,))
    wait = (0.006 + 0.004) / 2 * (filling / 2) / (2 * (1 - filling / 2))  # behind the other's calls
    seconds = (0.024 + wait, 0.026 + wait)
    rates, loads = (3.0 / seconds[0], 3.3 / seconds[1]), (0.004 / seconds[0], 0.006 / seconds[1])
    assert found.load == pytest.approx(loads[0])
    assert found.price == pytest.approx((rates[1] - rates[0]) / (loads[1] - loads[0]))
    assert found.tokens_per_second == pytest.approx(rates[0] + 1.0 / 0.02)


def queueing(seconds: float, unused: float = 0.0) -> tuple[float, float]:
    """Price and tokens per second where the drafts of some wait `seconds`, and `unused` is told by others
    who do not draft."""
    users = [replace(demand(0.8), used=0.05, queue_seconds=seconds)] * 6
    found = draft_prices([*users, *[replace(demand(0.8), used=0.0, queue_seconds=unused)] * 6])
    return found.price, found.tokens_per_second


def test_measured_waits_count_within_bounds_and_only_of_those_who_draft() -> None:
    assert queueing(0.0)[1] > queueing(0.001)[1] > queueing(0.01)[1]
    assert queueing(0.1) == queueing(1.0)
    assert queueing(0.001, unused=0.0) == queueing(0.001, unused=1.0)


def test_a_price_that_nobody_renews_fades() -> None:
    assert faded(100.0, 0.0) == faded(100.0, FRESH_SECONDS) == 100.0
    assert faded(100.0, FRESH_SECONDS + HALF_LIFE_SECONDS) == pytest.approx(50.0)
    assert faded(100.0, FRESH_SECONDS + 20 * HALF_LIFE_SECONDS) < 0.001
