"""Verifiers that share a drafter are told what its time is worth to the others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.cluster.planning.draft_market import FORGET_SECONDS, REPRICE_SECONDS, DraftMarket
from dspark_core.records import RequestSurvival, RoundReport
from tests.support.clock import ManualClock

STEP_SECONDS, PASS_SECONDS = 0.020, 0.004
MODEL = RoundTimeModel(
    StepTimeModel.of_curve((1, 128), (STEP_SECONDS, STEP_SECONDS)), DraftTimeModel((1,), (PASS_SECONDS,))
)


def report(
    name: str, number: int, *, drafter: str = "d", accepted: int = 2, drafted: bool = True, queue: float = 0.0
) -> RoundReport:
    return RoundReport(
        replica_id=name,
        round=number,
        requests=tuple(
            RequestSurvival(
                sequence_id=f"{name}/{index}",
                survival=(0.9, 0.8, 0.7) if drafted else (),
                verify_length=3 if drafted else 0,
                accepted=accepted if drafted else 0,
            )
            for index in range(4)
        ),
        batch_tokens=16,
        step_seconds=STEP_SECONDS,
        draft_seconds=PASS_SECONDS + queue if drafted else 0.0,
        draft_compute_seconds=PASS_SECONDS if drafted else 0.0,
        drafter_id=drafter if drafted else "",
    )


def prices(market: DraftMarket, names: list[str], clock: ManualClock, rounds: int = 10, **how) -> list[float]:
    for number in range(1, rounds + 1):
        for name in names:
            market.observe(report(name, number, **how), MODEL)
    clock.advance(REPRICE_SECONDS)
    return [market.price(name) for name in names]


def test_a_verifier_alone_with_its_drafter_pays_nothing() -> None:
    clock = ManualClock()
    market = DraftMarket(clock)
    assert prices(market, ["a"], clock) == [0.0]
    assert market.price("unheard of") == 0.0


def test_many_at_one_drafter_pay_and_those_at_another_do_not() -> None:
    clock, told = ManualClock(), dict[str, float]()
    market = DraftMarket(clock, told.__setitem__)
    for number in range(1, 11):
        for index in range(12):
            market.observe(report(f"v{index}", number), MODEL)
        market.observe(report("alone", number, drafter="other"), MODEL)
    clock.advance(REPRICE_SECONDS)
    found = [market.price(f"v{index}") for index in range(12)]
    assert min(found) > 0.0
    assert market.price("alone") == 0.0
    assert told["d"] > 0.0
    assert told["other"] == 0.0


def test_what_both_cohorts_of_a_verifier_gain_is_known() -> None:
    """Or half of its requests, and what drafts are worth to them, would be forgotten in every round."""
    clock = ManualClock()
    whole, in_turns = DraftMarket(clock), DraftMarket(clock)
    for number in range(1, 21):
        for index in range(12):
            of_all = report(f"v{index}", number)
            whole.observe(of_all, MODEL)
            cohort = of_all.requests[2 * (number % 2) :][:2]
            in_turns.observe(dataclasses.replace(of_all, requests=cohort, cohorts=2), MODEL)
    clock.advance(REPRICE_SECONDS)
    for index in range(12):
        assert in_turns.price(f"v{index}") == pytest.approx(whole.price(f"v{index}"), rel=0.1)
        assert whole.price(f"v{index}") > 0.0


def test_without_a_drafter_s_name_there_is_no_market() -> None:
    clock = ManualClock()
    market = DraftMarket(clock)
    assert set(prices(market, [f"v{index}" for index in range(12)], clock, drafter="")) == {0.0}


def test_who_stopped_drafting_is_still_known_and_does_not_make_it_cheap() -> None:
    clock = ManualClock()
    market = DraftMarket(clock)
    names = [f"v{index}" for index in range(12)]
    before = max(prices(market, names, clock))
    for name in names[4:]:
        market.observe(report(name, 11, drafted=False), MODEL)
    clock.advance(REPRICE_SECONDS)
    assert max(market.price(name) for name in names) > 0.5 * before


def test_verifiers_that_fell_silent_ask_for_nothing() -> None:
    clock, told = ManualClock(), dict[str, float]()
    market = DraftMarket(clock, told.__setitem__)
    names = [f"v{index}" for index in range(12)]
    assert max(prices(market, names, clock)) > 0.0
    clock.advance(FORGET_SECONDS)
    market.observe(report("v0", 20), MODEL)
    assert market.price("v0") == 0.0
    assert told["d"] == 0.0


def test_drafts_that_are_not_accepted_are_worth_less_than_promised() -> None:
    def price_of(accepted: int) -> float:
        clock = ManualClock()
        market = DraftMarket(clock)
        names = [f"v{index}" for index in range(12)]
        return max(prices(market, names, clock, rounds=40, accepted=accepted))

    assert price_of(3) > price_of(1) >= 0.0


def test_rounds_without_requests_are_harmless() -> None:
    clock = ManualClock()
    market = DraftMarket(clock)
    empty = dataclasses.replace(report("a", 1), requests=())
    market.observe(empty, MODEL)
    market.observe(report("b", 1), None)
    clock.advance(REPRICE_SECONDS)
    assert market.price("a") == market.price("b") == 0.0


class _Unpriceable(StepTimeModel):
    def table(self, *shape) -> np.ndarray:
        raise IndexError("index -1 is out of bounds")


def test_a_verifier_that_cannot_be_priced_disturbs_neither_its_drafter_s_others_nor_other_drafters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    market = DraftMarket(clock)
    broken = _Unpriceable(MODEL.verify.points)
    names = [f"v{index}" for index in range(12)]
    for number in range(1, 11):
        market.observe(report("broken", number, drafter="b"), dataclasses.replace(MODEL, verify=broken))
        market.observe(report("neighbour", number, drafter="b"), MODEL)
        for name in names:
            market.observe(report(name, number), MODEL)
    for _ in range(3):
        clock.advance(REPRICE_SECONDS)
        assert market.price("neighbour") == market.price("broken") == 0.0
        assert min(market.price(name) for name in names) > 0.0
    assert caplog.text.count("no prices for drafter b: IndexError") == 1
