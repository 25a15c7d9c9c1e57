"""Two cohorts in turns: their round times compared to a simulated machine, and when turns pay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.cohorts import COHORTS, cycle_seconds, worth_turns
from dspark_core.algorithms.drafting_choice import drafting_order, worth_drafting
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel

seconds = st.floats(0.0, 0.1)


def times(per_token: float, base: float, draft: float, network: float) -> RoundTimeModel:
    curve = StepTimeModel.of_curve((1, 1000), (base + per_token, base + 1000 * per_token))
    return RoundTimeModel(curve, DraftTimeModel((1,), (draft,)), network)


def simulated_cycle(step: float, draft: float, network: float, cycles: int = 200) -> float:
    """Seconds per cycle of two cohorts with one target and one drafter, each doing one thing at a time."""
    asked, drafter_free, target_free = [0.0, 0.0], 0.0, 0.0
    ends: list[float] = []
    for turn in range(COHORTS * cycles):
        cohort = turn % COHORTS
        drafter_free = max(asked[cohort] + network / 2, drafter_free) + draft
        target_free = max(target_free, drafter_free + network / 2) + step
        asked[cohort] = target_free
        ends.append(target_free)
    half = len(ends) // 2
    return COHORTS * (ends[-1] - ends[half - 1]) / (len(ends) - half)


@given(step=st.floats(0.001, 0.1), draft=seconds, network=seconds)
def test_a_cycle_takes_what_two_cohorts_one_target_and_one_drafter_take(
    step: float, draft: float, network: float
) -> None:
    model = times(0.0, step, draft, network)
    predicted = cycle_seconds(model, requests=8, batch_tokens=16, drafted=8)
    assert predicted == pytest.approx(simulated_cycle(step, draft, network), rel=0.02)


@given(draft=seconds, network=seconds, beside=seconds, drafted=st.integers(0, 8))
def test_tables_hold_what_numbers_say(draft: float, network: float, beside: float, drafted: int) -> None:
    model = replace(times(0.001, 0.01, draft, network), beside_seconds=beside)
    assert model.overhead_table(8)[drafted] == pytest.approx(model.overhead_seconds(drafted))


GAINS, VERIFIED = np.full(16, 1.8), np.full(16, 2.0)


@pytest.mark.parametrize(("drafting", "pays"), [(0.002, False), (0.012, True), (0.1, False)])
def test_turns_pay_where_they_hide_more_than_the_second_pass_costs(drafting: float, pays: bool) -> None:
    """A pass takes at least 8 ms, so a second pass costs that much. If drafting takes longer than its tokens
    are worth in any case, nobody is drafted for, and there is nothing to hide."""
    for draft, network in ((drafting, 0.0), (0.0, drafting)):
        beside = worth_turns(GAINS, VERIFIED, times(0.0005, 0.008, draft, network))
        assert (beside is not None) == pays
        assert beside is None or beside == pytest.approx(0.008 + 8 * 3 * 0.0005)


def test_turns_do_not_pay_where_weights_take_the_time() -> None:
    assert worth_turns(GAINS, VERIFIED, times(0.0, 0.030, 0.010, 0.002)) is None


def test_turns_make_drafts_pay_that_do_not_by_themselves() -> None:
    """A third more tokens take a third more time including the drafter's, but hardly more without it."""
    stairs = RoundTimeModel(
        StepTimeModel.of_curve((1, 8, 12, 16, 24), (0.004, 0.0100, 0.0105, 0.0200, 0.0205)),
        DraftTimeModel((1,), (0.007,)),
    )
    gains, verified = np.full(16, 0.35), np.full(16, 0.5)
    assert 16 * 1.35 / stairs.seconds(16, 24, 0, 16) < 16 / stairs.seconds(16, 16)
    assert worth_turns(gains, verified, stairs) is not None


def test_nobody_takes_turns_alone_or_without_drafts() -> None:
    slow = times(0.0005, 0.008, 0.012, 0.0)
    assert worth_turns(GAINS, VERIFIED, slow) is not None
    assert worth_turns(GAINS[:1], VERIFIED[:1], slow) is None
    assert worth_turns(np.zeros(16), VERIFIED, slow) is None


@pytest.mark.parametrize(("drafting", "pays"), [(0.0092, False), (0.0108, True)])
def test_turns_that_gain_less_than_times_are_known_to_are_not_taken(drafting: float, pays: bool) -> None:
    """A common round takes 32 ms and its drafting, two passes in turns 40 ms: a gain of 3 or 7 %."""
    assert (worth_turns(GAINS, VERIFIED, times(0.0005, 0.008, drafting, 0.0)) is not None) == pays


LONG_GAINS, LONG_VERIFIED = np.full(16, 5.5), np.full(16, 6.0)


def test_one_drafter_for_both_cohorts_bounds_the_cycle() -> None:
    """Each pass of 58 ms hides most of a draft of 80 ms, but two drafts take longer than two passes."""
    assert worth_turns(LONG_GAINS, LONG_VERIFIED, times(0.0005, 0.030, 0.060, 0.0)) is not None
    assert worth_turns(LONG_GAINS, LONG_VERIFIED, times(0.0005, 0.030, 0.080, 0.0)) is None


def test_drafting_twice_is_paid_for_twice() -> None:
    model = times(0.0005, 0.030, 0.050, 0.0)
    assert worth_turns(LONG_GAINS, LONG_VERIFIED, model) is not None
    assert worth_drafting(LONG_GAINS, LONG_VERIFIED, model, price=300.0).all()
    assert worth_turns(LONG_GAINS, LONG_VERIFIED, model, price=300.0) is None


def test_each_cohort_has_half_of_the_context() -> None:
    points = [StepPoint(1, tokens, 0, 0.008 + 0.0005 * tokens) for tokens in (1, 1000)]
    points.append(StepPoint(1, 1, 10_000, 0.0085 + 0.010))
    model = RoundTimeModel(StepTimeModel(tuple(points)), DraftTimeModel((1,), (0.012,)))
    beside = worth_turns(GAINS, VERIFIED, model, context_tokens=2000)
    assert beside == pytest.approx(model.seconds(8, 24, 1000))


def test_an_odd_request_makes_both_rounds_of_a_cycle_longer() -> None:
    model = times(0.001, 0.008, 0.0, 0.0)
    assert cycle_seconds(model, requests=3, batch_tokens=5) == pytest.approx(2 * model.seconds(2, 3))


WEIGHTS_BOUND = (0.0002, 0.010)


@pytest.mark.parametrize(
    ("draft", "gains", "verified"),
    [
        (0.004, (1.8, 0.0), (2.0, 0.0)),  # one cannot be drafted for
        (0.006, (1.8,) * 3, (2.0,) * 3),
        (0.008, (1.8,) * 5, (2.0,) * 5),
        (0.006, (3.0, 1.0, 0.5, 0.0), (4.0, 2.0, 2.0, 0.0)),
    ],
)
def test_both_cohorts_are_looked_at_not_the_better_one(draft: float, gains, verified) -> None:
    per_token, base = WEIGHTS_BOUND
    assert worth_turns(np.array(gains), np.array(verified), times(per_token, base, draft, 0.001)) is None


@given(
    st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.5, 6.0)), min_size=2, max_size=12),
    st.floats(0.0, 0.002),
    st.floats(0.001, 0.05),
    seconds,
    seconds,
)
def test_turns_that_are_taken_are_faster_on_a_simulated_machine(
    given_: list[tuple[float, float]], per_token: float, base: float, draft: float, network: float
) -> None:
    """With unequal cohorts and the best choice of whom to draft for, counting all of the rounds' time."""
    gains, verified = (np.array(column) for column in zip(*given_, strict=True))
    model = times(per_token, base, draft, network)
    if worth_turns(gains, verified, model) is None:
        return
    together = worth_drafting(gains, verified, model)
    count = len(gains)
    rate = (count + gains[together].sum()) / model.seconds(
        count, count + verified[together].sum(), 0, int(together.sum())
    )
    order = drafting_order(gains, verified)
    best = 0.0
    for drafted in itertools.product(*(range(len(order[i::2]) + 1) for i in (0, 1))):
        halves = [order[i::2] for i in (0, 1)]
        tokens = count + sum(gains[half[:n]].sum() for half, n in zip(halves, drafted, strict=True))
        steps = [
            model.seconds(len(half), len(half) + verified[half[:n]].sum())
            for half, n in zip(halves, drafted, strict=True)
        ]
        best = max(
            best, tokens / simulated_unequal(steps, [draft * (n > 0) for n in drafted], network, drafted)
        )
    assert best > rate


def simulated_unequal(
    steps: list[float], drafts: list[float], network: float, drafted: tuple[int, ...], cycles: int = 60
) -> float:
    """Seconds per cycle of two unequal cohorts."""
    asked, drafter_free, target_free = [0.0, 0.0], 0.0, 0.0
    ends: list[float] = []
    for turn in range(2 * cycles):
        cohort = turn % 2
        ready = asked[cohort]
        if drafted[cohort]:
            drafter_free = max(asked[cohort] + network / 2, drafter_free) + drafts[cohort]
            ready = drafter_free + network / 2
        target_free = asked[cohort] = max(target_free, ready) + steps[cohort]
        ends.append(target_free)
    return (ends[-1] - ends[cycles - 1]) / (cycles / 2)


def test_a_price_that_leaves_nobody_drafted_for_leaves_nothing_to_hide() -> None:
    model = times(0.0005, 0.008, 0.012, 0.0)
    assert worth_turns(GAINS, VERIFIED, model) is not None
    assert worth_turns(GAINS, VERIFIED, model, price=1e6) is None
