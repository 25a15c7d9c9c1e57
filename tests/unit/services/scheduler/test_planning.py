"""Curves are learned from steps; plans come from the newest round and never from nothing."""

import itertools

import pytest

from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.records import RequestSurvival, RoundReport
from services.scheduler.curves import refined
from services.scheduler.planner import VerifierPlanner


def _true_seconds(batch_tokens: int) -> float:
    """Flat up to 16 tokens, then 1 ms for each further one."""
    return 0.020 + 0.001 * max(0, batch_tokens - 16)


def _report(round_: int, survival=((0.9, 0.8),), **fields) -> RoundReport:
    requests = tuple(
        RequestSurvival(sequence_id=str(index), survival=tuple(row), verify_length=0, accepted=0)
        for index, row in enumerate(survival)
    )
    return RoundReport(replica_id="v", round=round_, requests=requests, **fields)


def test_a_curve_is_learned_without_a_profile():
    curve = None
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64]
    for batch_tokens in itertools.islice(itertools.cycle(sizes), 2000):
        curve = refined(curve, batch_tokens, _true_seconds(batch_tokens))
    assert curve is not None
    for batch_tokens in sizes:
        assert curve.seconds(batch_tokens) == pytest.approx(_true_seconds(batch_tokens), rel=0.05)


def test_steps_of_every_size_do_not_grow_the_curve_without_bound():
    curve = None
    for batch_tokens in range(1, 5000):
        curve = refined(curve, batch_tokens, 0.01)
    assert curve is not None
    assert len(curve.batch_tokens) <= 64


def test_one_stalled_step_does_not_decide_a_new_point():
    curve = refined(StepRateCurve((1, 10), (0.01, 0.01)), 5, 30.0)
    assert curve.seconds(5) <= 0.02


def test_nothing_is_planned_from_nothing():
    planner = VerifierPlanner()
    assert planner.plan() is None
    planner.observe(_report(1))  # no timed step: no curve
    assert planner.plan() is None
    planner.observe(_report(2, survival=((), ()), batch_tokens=2, step_seconds=0.01))  # no drafts
    assert planner.plan() is None
    planner.observe(_report(3, survival=(), batch_tokens=2, step_seconds=0.01))  # no requests
    assert planner.plan() is None


FLAT = ((1, 0.02), (64, 0.02))
STEEP = ((1, 0.001), (2, 10.0))


def test_free_steps_verify_everything_and_costly_ones_nothing():
    for profile, capacity in ((FLAT, 4), (STEEP, 0)):
        planner = VerifierPlanner()
        planner.observe(_report(7, survival=((0.9, 0.8), (0.5, 0.1)), profile=profile))
        plan = planner.plan()
        assert plan is not None
        assert (plan.based_on_round, plan.draft_token_capacity) == (7, capacity)


def test_draft_time_makes_longer_rounds_worth_their_wait():
    """A token that does not pay by the pass alone pays when every round also waits for drafts."""
    profile = ((1, 0.010), (2, 0.018), (3, 0.026))
    capacities = []
    for draft_seconds in (0.0, 0.1):
        planner = VerifierPlanner()
        planner.observe(_report(1, survival=((0.7, 0.5),), profile=profile, draft_seconds=draft_seconds))
        plan = planner.plan()
        assert plan is not None
        capacities.append(plan.draft_token_capacity)
    assert capacities == [0, 2]


def test_older_rounds_are_ignored_until_a_new_stream_begins():
    planner = VerifierPlanner()
    assert planner.observe(_report(5, profile=FLAT))
    assert not planner.observe(_report(5))
    assert not planner.observe(_report(4))
    planner.begin_stream()
    assert planner.plan() is None
    assert planner.observe(_report(1))
    plan = planner.plan()
    assert plan is not None  # the curve outlived the stream
    assert plan.based_on_round == 1


def test_a_repeated_profile_does_not_undo_what_was_learned():
    planner = VerifierPlanner()
    flat_then_steep = ((1, 0.01), (3, 0.01))
    planner.observe(_report(1, profile=flat_then_steep))
    for round_ in range(2, 400):
        planner.observe(_report(round_, batch_tokens=3, step_seconds=0.1))
        planner.observe(_report(round_, batch_tokens=1, step_seconds=0.01))
    learned = planner.plan()
    planner.begin_stream()
    planner.observe(_report(1, profile=flat_then_steep))
    relearned = planner.plan()
    assert learned is not None
    assert relearned is not None
    assert learned.draft_token_capacity == relearned.draft_token_capacity == 0
