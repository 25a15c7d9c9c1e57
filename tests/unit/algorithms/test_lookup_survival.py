"""The expected acceptance of looked-up tokens, and how it adapts to outcomes."""

from __future__ import annotations

import random

import pytest

from dspark_core.algorithms.lookup_survival import LEAST, MOST, LookupSurvival


def test_promises_are_believed_until_something_is_known() -> None:
    assert LookupSurvival().confidences((0.3, 0.95)) == pytest.approx((0.3, 0.95))
    assert LookupSurvival().confidences((0.0, 1.0)) == (LEAST, MOST)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.98])
@pytest.mark.parametrize("promised", [0.12, 0.66, 0.97])
def test_corrections_follow_what_was_accepted(rate: float, promised: float) -> None:
    known, chance = LookupSurvival(), random.Random(0)
    for _ in range(600):
        known.learn((promised,), 1, int(chance.random() < rate))
    assert known.confidences((promised,))[0] == pytest.approx(rate, abs=0.08)
    assert known.confidences((0.4,)) == (0.4,)  # another class


def test_of_promises_alike_the_greater_stays_greater() -> None:
    known = LookupSurvival()
    for _ in range(50):
        known.learn((0.55,), 1, 0)
    lower, higher = known.confidences((0.52, 0.58))
    assert LEAST <= lower < higher < 0.1


def test_corrected_promises_stay_probabilities() -> None:
    known = LookupSurvival()
    for _ in range(300):
        known.learn((0.81, 0.19), 2, 1)
    assert known.confidences((0.89, 0.11)) == (MOST, LEAST)


def test_tokens_after_the_first_loss_teach_nothing() -> None:
    known = LookupSurvival()
    for _ in range(200):
        known.learn((0.5, 0.6, 0.7), 3, 1)
    first, second, third = known.confidences((0.5, 0.6, 0.7))
    assert first > 0.9 > 0.1 > second
    assert third == 0.7


def test_old_outcomes_fade() -> None:
    known = LookupSurvival()
    for accepted in (0, 1):
        for _ in range(800):
            known.learn((0.5,), 1, accepted)
    assert known.confidences((0.5,))[0] > 0.95
