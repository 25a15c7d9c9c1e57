"""Served rounds move the profile's points towards what they took, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.simulation.live_times import ServedRound, corrected

PROFILE = RoundTimeModel(
    StepTimeModel(
        tuple(
            StepPoint(requests, requests * each, 128 * requests, 0.01 + 0.001 * requests * each)
            for requests in (1, 4, 16)
            for each in (1, 4, 8)
        )
    ),
    DraftTimeModel((1, 16), (0.004, 0.020)),
)


def served(requests: int, tokens: int, slowdown: float, drafted: int = 0) -> ServedRound:
    context = 128 * requests
    return ServedRound(
        requests=requests,
        batch_tokens=tokens,
        context_tokens=context,
        step_seconds=slowdown * PROFILE.verify.seconds(requests, tokens, context),
        drafted=drafted,
        draft_seconds=2.0 * PROFILE.draft.seconds(drafted),
    )


def test_rounds_as_profiled_change_nothing() -> None:
    rounds = [served(4, tokens, 1.0) for tokens in (4, 16, 32)] * 3
    found = corrected(PROFILE, rounds)
    for point in PROFILE.verify.points:
        assert found.verify.seconds(
            point.requests, point.batch_tokens, point.context_tokens
        ) == pytest.approx(point.seconds)


def test_each_kind_of_round_has_a_ratio_of_its_own() -> None:
    rounds = [served(1, 1, 1.5)] * 3 + [served(16, 16, 1.1)] * 3 + [served(16, 128, 2.0)] * 3
    found = corrected(PROFILE, rounds).verify
    before = PROFILE.verify
    for requests, tokens, ratio in ((1, 1, 1.5), (16, 16, 1.1), (16, 128, 2.0)):
        context = 128 * requests
        assert found.seconds(requests, tokens, context) == pytest.approx(
            ratio * before.seconds(requests, tokens, context)
        )
    # Four requests lie between one and sixteen, a fifth of the way.
    assert found.seconds(4, 4, 512) == pytest.approx(1.42 * before.seconds(4, 4, 512))


def test_drafts_are_corrected_by_how_many_were_drafted_for() -> None:
    found = corrected(PROFILE, [served(16, 32, 1.0, drafted=16)] * 3).draft
    assert found.draft_seconds == pytest.approx((0.008, 0.040))


def test_one_stalled_round_or_two_say_nothing() -> None:
    assert corrected(PROFILE, [served(4, 4, 50.0)] * 2) == PROFILE
    rounds = [served(4, 4, 1.0)] * 4 + [served(4, 4, 50.0)]
    assert corrected(PROFILE, rounds).verify.seconds(4, 4, 512) == pytest.approx(0.014)


def test_the_round_loops_time_becomes_a_line_by_requests() -> None:
    rounds = [
        replace(served(count, count, 1.0), loop_seconds=0.001 + 0.0002 * count)
        for count in (1, 4, 16)
        for _ in range(3)
    ]
    loop = corrected(PROFILE, rounds).loop
    assert (loop.round_seconds, loop.request_seconds) == pytest.approx((0.001, 0.0002))
    assert corrected(PROFILE, rounds[:3]).loop.seconds(16) == pytest.approx(0.0012)
