"""The local planner: plans by times that follow the machine, and drafts only where that pays."""

from __future__ import annotations

import dataclasses

import pytest

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.rounds.planning import (
    UNPROFILED_MAX_LENGTH,
    FullPlanSource,
    LocalPlanSource,
    conservative_lengths,
)
from dspark_core.records import DraftOrigin, RequestSurvival, RoundReport

CURVE = StepTimeModel.of_curve((1, 2, 3, 4, 5), (0.020, 0.021, 0.022, 0.030, 0.040))
REQUESTS = [PlanRequest(sequence_id="a", survival=(0.8, 0.5, 0.2, 0.1))]


def source(draft_seconds: float | None = None) -> LocalPlanSource:
    draft = DraftTimeModel() if draft_seconds is None else DraftTimeModel((1,), (draft_seconds,))
    return LocalPlanSource(RoundTimeModel(CURVE, draft))


def report(
    verified: int,
    step_seconds: float,
    draft_seconds: float = 0.0,
    accepted: int = 0,
    prefill: int = 0,
    primed: bool = False,
) -> RoundReport:
    told = RequestSurvival(
        sequence_id="a", survival=(0.8, 0.5, 0.2, 0.1), verify_length=verified, accepted=accepted
    )
    return RoundReport(
        replica_id="v",
        round=1,
        requests=(told,),
        batch_tokens=1 + verified + prefill,
        step_seconds=step_seconds,
        draft_seconds=draft_seconds,
        drafter_primed=primed,
    )


def test_tokens_are_admitted_while_throughput_rises() -> None:
    # 1/20, 1.8/21, 2.3/22, 2.5/30: the third token costs more than it gains.
    assert source().plan(REQUESTS) == (2,)


def test_a_long_wait_for_drafts_makes_more_verification_worth_while() -> None:
    planner = source()
    for _ in range(50):
        planner.report(report(2, 0.022, draft_seconds=0.2))
    assert planner.plan(REQUESTS)[0] > 2


def test_a_drafter_that_catches_up_every_time_is_as_slow_as_that() -> None:
    planner = source(draft_seconds=0.001)
    for _ in range(6):
        planner.wants_draft([DraftCandidate(sequence_id="a")])
        planner.report(report(2, 0.021, draft_seconds=0.01, accepted=2, primed=True))
    now = planner.round_time
    assert now is not None
    assert now.draft.seconds(1) > 0.0012


def test_a_drafter_that_catches_up_after_a_pause_is_not_taken_for_slow() -> None:
    planner = source(draft_seconds=0.1)
    primed = 0
    for _ in range(300):
        (wants,) = planner.wants_draft([DraftCandidate(sequence_id="a")])
        if wants:
            primed += 1
            planner.report(report(2, 0.021, draft_seconds=0.2, primed=primed > 3))
        else:
            planner.report(report(0, 0.020))
    now = planner.round_time
    assert now is not None
    assert primed > 6
    assert now.draft.seconds(1) < 0.13  # the three consecutive ones moved it by 7 % each


def test_a_machine_slower_than_at_start_keeps_the_shape_of_its_curve() -> None:
    """The shape is the same, so the plan is, too; but with slower steps the wait for drafts matters less."""
    planner, slow = source(), source()
    for _ in range(200):
        planner.report(report(2, 0.022, draft_seconds=0.2))
        slow.report(report(2, 0.220, draft_seconds=0.2))
    assert slow.plan(REQUESTS) == source().plan(REQUESTS) == (2,)
    assert planner.plan(REQUESTS)[0] > 2


def test_drafts_beside_which_another_context_was_taken_in_say_nothing_of_usual_ones() -> None:
    def learned(primed: bool, others_survival: tuple[float, ...]) -> bool:
        planner = source(draft_seconds=0.004)
        assert planner.wants_draft([DraftCandidate(sequence_id=name) for name in "ab"]) == (True, True)
        before = planner.round_time
        told = report(2, 0.0, draft_seconds=0.2, primed=primed)
        other = RequestSurvival(sequence_id="b", survival=others_survival, verify_length=0, accepted=0)
        planner.report(dataclasses.replace(told, requests=(*told.requests, other)))
        return planner.round_time != before

    assert not learned(True, ())  # b should be drafted for but is still being primed
    assert learned(True, (0.9,))
    assert learned(False, ())


def test_one_stall_changes_no_plan() -> None:
    planner = source()
    planner.report(report(0, 30.0))
    assert planner.plan(REQUESTS) == (2,)


def test_a_prompt_in_the_step_says_nothing_about_decoding() -> None:
    planner = source()
    before = planner.round_time
    planner.report(report(2, 5.0, prefill=256))
    assert planner.round_time == before


def test_no_requests_no_plan() -> None:
    assert source().plan([]) == ()


def test_a_given_capacity_is_spent_instead() -> None:
    assert source().plan(REQUESTS, 1) == (1,)
    assert FullPlanSource().plan(REQUESTS) == (4,)
    assert FullPlanSource().plan([*REQUESTS, PlanRequest(survival=(0.9, 0.1))], 2) == (1, 1)


def test_an_engine_nobody_profiled_verifies_only_what_is_likely_to_stand() -> None:
    planner = LocalPlanSource(None)
    for _ in range(10):
        planner.report(report(2, 0.001))
    likely = PlanRequest(survival=(0.95, 0.9, 0.9, 0.9))
    assert planner.plan([likely, *REQUESTS, PlanRequest(survival=(0.3, 0.3))]) == (
        UNPROFILED_MAX_LENGTH,
        1,
        0,
    )
    assert planner.round_time is None


@pytest.mark.parametrize("later", [(), (0.0,), (0.9, 0.9)])
def test_a_token_does_not_decide_on_itself_without_a_profile(later: tuple[float, ...]) -> None:
    assert conservative_lengths([PlanRequest(survival=(0.5, *later))]) == (0,)


def rounds_drafted(planner: LocalPlanSource, rounds: int, accepted: int, verify: int = 2) -> int:
    """How many of `rounds` rounds are drafted for, if each draft gains `accepted` tokens."""
    drafted = 0
    for _ in range(rounds):
        (wants,) = planner.wants_draft([DraftCandidate(sequence_id="a")])
        drafted += wants
        if wants:
            planner.report(report(verify, CURVE.seconds(1, 1 + verify), 0.010, accepted))
        else:
            told = RequestSurvival(sequence_id="a", survival=(), verify_length=0, accepted=0)
            planner.report(
                RoundReport(
                    replica_id="v",
                    round=1,
                    requests=(told,),
                    batch_tokens=1,
                    step_seconds=CURVE.seconds(1, 1),
                )
            )
    return drafted


def test_drafts_that_do_not_pay_are_dropped_and_rarely_tried_again() -> None:
    planner = source(0.010)
    # A round of 20 ms gives one token; with drafts that are never accepted it takes 32 ms.
    assert rounds_drafted(planner, 100, accepted=0) < 20
    assert rounds_drafted(planner, 1000, accepted=0) < 15
    assert planner.paused_requests in (0, 1)


def test_drafts_that_pay_are_always_asked_for() -> None:
    assert rounds_drafted(source(0.010), 200, accepted=2) == 200


def test_drafting_comes_back_when_it_pays_again() -> None:
    planner = source(0.010)
    rounds_drafted(planner, 100, accepted=0)
    rounds_drafted(planner, 1000, accepted=2)
    assert rounds_drafted(planner, 100, accepted=2) == 100


def looked_up(survival: tuple[float, ...], count: int, coupled: bool = True) -> list[PlanRequest]:
    return [
        PlanRequest(sequence_id=f"s{n}", survival=survival, coupled=coupled, origin=DraftOrigin.LOOKUP)
        for n in range(count)
    ]


def test_a_plan_for_a_percent_or_two_is_not_followed() -> None:
    """Each token costs 0.9 of a request's share of the round: one with survival 0.92 hardly pays."""
    steps = StepTimeModel.of_curve((8, 64), (0.008, 0.0584))
    planner = LocalPlanSource(RoundTimeModel(steps))
    assert planner.plan(looked_up((0.92,), 8)) == (0,) * 8
    assert planner.plan(looked_up((0.99,), 8)) == (1,) * 8


def test_where_a_plan_may_not_look_ahead_it_is_followed_as_it_is() -> None:
    """Dropping it would make verification depend on later tokens."""
    steps = StepTimeModel.of_curve((8, 64), (0.008, 0.0584))
    planner = LocalPlanSource(RoundTimeModel(steps))
    assert planner.plan(looked_up((0.92,), 8, coupled=False)) == (1,) * 8


STEEP = StepTimeModel.of_curve((1, 2, 3, 4, 5), (0.020, 0.024, 0.028, 0.032, 0.036))
LIKELY = (0.9, 0.85, 0.8, 0.75)


def served(planner: LocalPlanSource, round_: int, factor: float, floor: float | None = None) -> int:
    """Plays a round of a request with looked-up tokens that cost `factor` times as much as profiled."""
    request = PlanRequest(
        sequence_id="a",
        survival=LIKELY,
        coupled=True,
        origin=DraftOrigin.LOOKUP,
        floor_tokens_per_second=floor,
    )
    (length,) = planner.plan([request])
    told = RequestSurvival(
        sequence_id="a", survival=LIKELY, verify_length=length, accepted=0, origin=DraftOrigin.LOOKUP
    )
    planner.report(
        RoundReport(
            replica_id="v",
            round=round_,
            requests=(told,),
            batch_tokens=1 + length,
            step_seconds=0.020 + factor * 0.004 * length,
        )
    )
    return length


@pytest.mark.parametrize("rounds_before", [20, 400])
def test_tokens_that_became_dear_are_no_longer_verified_within_ten_rounds(rounds_before: int) -> None:
    """As when cores are taken away: a step of one token takes as long as before."""
    planner = LocalPlanSource(RoundTimeModel(STEEP))
    before = [served(planner, round_, 1.0) for round_ in range(rounds_before)]
    dear = [served(planner, round_, 10.0) for round_ in range(20)]
    assert before[-5:] == [4] * 5
    assert dear[10:] == [0] * 10
    back = [served(planner, round_, 1.0) for round_ in range(1200)]
    assert min(back[-5:]) >= 3


def test_where_steps_did_not_change_nothing_is_tried() -> None:
    planner = LocalPlanSource(RoundTimeModel(STEEP))
    assert {served(planner, round_, 1.1) for round_ in range(300)} == {4}


def test_no_floor_is_broken_to_find_out_what_changed() -> None:
    planner = LocalPlanSource(RoundTimeModel(STEEP))
    for round_ in range(20):
        served(planner, round_, 1.0)
    assert all(served(planner, round_, 4.0, floor=20.0) for round_ in range(30))


def test_a_machine_that_changes_all_the_time_is_not_asked_all_the_time() -> None:
    planner = LocalPlanSource(RoundTimeModel(STEEP))
    lengths = [served(planner, round_, 1.0 if round_ % 24 < 12 else 4.0) for round_ in range(480)]
    assert lengths.count(0) <= 5 * 480 // 64
