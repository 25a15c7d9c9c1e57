"""What looked-up tokens are expected to bring, and how that follows outcomes."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dspark_core.algorithms.lookup_survival import LookupSurvival
from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.algorithms.suffix_match import MAX_MATCH


@pytest.mark.parametrize("agreed", [1, 2, 5, MAX_MATCH])
def test_survival_never_rises_along_a_block(agreed: int) -> None:
    survival = survival_from_confidence(LookupSurvival().confidences(agreed, 15))
    assert len(survival) == 15
    assert all(a >= b > 0.0 for a, b in pairwise(survival))


def test_longer_agreement_promises_more() -> None:
    known = LookupSurvival()
    first = [known.confidences(agreed, 1)[0] for agreed in range(1, MAX_MATCH + 1)]
    assert all(a <= b for a, b in pairwise(first))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.98])
def test_rates_follow_what_was_accepted(rate: float) -> None:
    known, chance = LookupSurvival(), random.Random(0)
    for _ in range(600):
        known.learn(3, 1, int(chance.random() < rate))
    assert known.confidences(3, 1)[0] == pytest.approx(rate, abs=0.08)
    assert known.confidences(2, 1) == LookupSurvival().confidences(2, 1)


def test_tokens_after_the_first_loss_teach_nothing() -> None:
    known = LookupSurvival()
    for _ in range(200):
        known.learn(2, 5, 1)
    learned, prior = known.confidences(2, 5), LookupSurvival().confidences(2, 5)
    assert learned[0] > 0.9 > 0.1 > learned[1]
    assert learned[2:] == prior[2:]
