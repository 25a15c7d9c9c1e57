"""Figures computed on arrays equal slow ones computed round by round from their definitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.evaluation.acceptance import measure_acceptance
from dspark_core.evaluation.confidence import measure_confidence
from dspark_core.evaluation.round_table import DraftRound, RoundTable
from dspark_core.evaluation.threshold_sweep import THRESHOLDS, sweep_thresholds
from tests.unit.evaluation.strategies import draft_rounds

ROUNDS = st.lists(draft_rounds(), max_size=12)


def fates(one: DraftRound) -> list[bool | None]:
    """Of each verified position: stood with all before it, fell, or (None) never put to the test."""
    unseen = None if one.stopped else False
    return [True] * one.accepted + [unseen] * (one.verified - one.accepted)


def share(outcomes: list[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None


@given(ROUNDS)
def test_acceptance_follows_its_definitions(rounds: list[DraftRound]) -> None:
    found = measure_acceptance(RoundTable.from_rounds(rounds))
    assert found.accepted_length == share([one.committed for one in rounds])
    assert found.verify_length == share([one.verified for one in rounds])
    assert len(found.positions) == max((one.drafted for one in rounds), default=0)
    for k, position in enumerate(found.positions):
        verified = [fates(one)[k] for one in rounds if one.verified > k and fates(one)[k] is not None]
        tried = [
            fates(one)[k]
            for one in rounds
            if one.verified > k and one.accepted >= k and fates(one)[k] is not None
        ]
        assert (position.position, position.verified, position.tried) == (k + 1, len(verified), len(tried))
        assert position.survival == share([bool(fate) for fate in verified])
        assert position.accept_rate == share([bool(fate) for fate in tried])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_survival_is_the_product_of_conditional_rates_when_blocks_are_verified_whole(
    accepted: list[int],
) -> None:
    rounds = [DraftRound(drafted=4, verified=4, accepted=a, committed=a + 1) for a in accepted]
    running = 1.0
    for position in measure_acceptance(RoundTable.from_rounds(rounds)).positions:
        running *= position.accept_rate or 0.0
        assert position.survival == pytest.approx(running)


def test_an_accepted_stop_token_says_nothing_about_what_follows_it() -> None:
    stopped = DraftRound(drafted=4, verified=4, accepted=2, committed=2, stopped=True)
    fell = DraftRound(drafted=4, verified=4, accepted=2, committed=3)
    found = measure_acceptance(RoundTable.from_rounds([stopped, fell]))
    assert [position.tried for position in found.positions] == [2, 2, 1, 0]
    assert [position.accept_rate for position in found.positions] == [1.0, 1.0, 0.0, None]
    assert found.accepted_length == 2.5


@given(ROUNDS, st.sampled_from(THRESHOLDS))
def test_the_sweep_is_each_round_cut_at_the_threshold(rounds: list[DraftRound], threshold: float) -> None:
    points = sweep_thresholds(RoundTable.from_rounds(rounds), [threshold])
    if not any(one.survival for one in rounds):
        assert points == ()
        return
    lengths, accepted, committed = [], [], []
    for one in rounds:
        length = 0
        while length < one.verified and one.survival[length] >= threshold:
            length += 1
        tokens = [*range(1, one.accepted + 1), *([] if one.stopped else ["bonus"])]
        if length < one.accepted:
            tokens = [*tokens[:length], "target's own"]
        lengths.append(length)
        accepted.append(sum(token in range(1, length + 1) for token in tokens))
        committed.append(len(tokens))
    assert points[0].verify_length == pytest.approx(np.mean(lengths))
    assert points[0].accepted_length == pytest.approx(np.mean(committed))
    wanted = sum(accepted) / sum(lengths) if sum(lengths) else None
    assert points[0].acceptance_rate == (None if wanted is None else pytest.approx(wanted))


@given(ROUNDS)
def test_threshold_zero_changes_nothing_and_higher_ones_only_shorten(rounds: list[DraftRound]) -> None:
    table = RoundTable.from_rounds(rounds)
    points = sweep_thresholds(table)
    if not points:
        return
    whole = measure_acceptance(table)
    assert points[0].accepted_length == pytest.approx(whole.accepted_length)
    assert points[0].verify_length == pytest.approx(whole.verify_length)
    assert points[0].acceptance_rate == whole.acceptance_rate
    for lower, higher in pairwise(points):
        assert higher.verify_length <= lower.verify_length
        assert higher.accepted_length <= lower.accepted_length


def test_confidence_is_measured_where_outcomes_are_known() -> None:
    rounds = [
        DraftRound(drafted=2, verified=2, accepted=2, committed=3, survival=(0.8, 0.4)),
        DraftRound(drafted=2, verified=2, accepted=0, committed=1, survival=(0.6, 0.2)),
        DraftRound(drafted=2, verified=2, accepted=1, committed=1, stopped=True, survival=(0.9, 0.9)),
        DraftRound(drafted=2, verified=0, accepted=0, committed=1, survival=(0.1, 0.1)),
    ]
    first, second = measure_confidence(RoundTable.from_rounds(rounds))
    assert (first.rounds, second.rounds) == (3, 2)
    assert first.predicted == pytest.approx((0.8 + 0.6 + 0.9) / 3)
    assert first.observed == pytest.approx(2 / 3)
    assert first.brier == pytest.approx((0.2**2 + 0.6**2 + 0.1**2) / 3)
    assert first.auc == 1.0
    assert (second.predicted, second.observed) == (pytest.approx(0.3), 0.5)
    assert second.ece == pytest.approx((0.6 + 0.2) / 2)


@given(st.lists(draft_rounds(confident=False), max_size=5))
def test_without_a_confidence_head_there_is_nothing_to_measure(rounds: list[DraftRound]) -> None:
    table = RoundTable.from_rounds(rounds)
    assert measure_confidence(table) == ()
    assert sweep_thresholds(table) == ()
