"""The local planner: prefixes by Algorithm 1, on a curve that follows the machine's speed."""

from __future__ import annotations

from dspark_core.algorithms.step_rate import StepRateCurve
from dspark_core.engine.planning import LocalPlanSource
from dspark_core.records import RoundReport

CURVE = StepRateCurve((1, 2, 3, 4, 5), (0.020, 0.021, 0.022, 0.030, 0.040))
SURVIVAL = [[0.8, 0.5, 0.2, 0.1]]


def report(batch_tokens: int, step_seconds: float, draft_seconds: float = 0.0) -> RoundReport:
    return RoundReport(
        replica_id="v",
        round=1,
        batch_tokens=batch_tokens,
        step_seconds=step_seconds,
        draft_seconds=draft_seconds,
    )


def test_tokens_are_admitted_while_throughput_rises() -> None:
    # 1/20, 1.8/21, 2.3/22, 2.5/30: the third token costs more than it brings.
    assert LocalPlanSource(CURVE).plan(SURVIVAL) == (2,)


def test_a_long_wait_for_drafts_makes_more_verification_worth_while() -> None:
    planner = LocalPlanSource(CURVE)
    for _ in range(50):
        planner.report(report(3, 0.022, draft_seconds=0.2))
    assert planner.plan(SURVIVAL)[0] > 2


def test_a_machine_slower_than_at_start_scales_the_curve_as_a_whole() -> None:
    """The same shape, so the same plan; but the wait for drafts weighs less beside slower steps."""
    planner, slow = LocalPlanSource(CURVE), LocalPlanSource(CURVE)
    for _ in range(200):
        planner.report(report(3, 0.022, draft_seconds=0.2))
        slow.report(report(3, 0.220, draft_seconds=0.2))
    assert slow.plan(SURVIVAL) == LocalPlanSource(CURVE).plan(SURVIVAL) == (2,)
    assert planner.plan(SURVIVAL)[0] > 2


def test_one_stall_changes_no_plan() -> None:
    planner = LocalPlanSource(CURVE)
    planner.report(report(1, 30.0))
    assert planner.plan(SURVIVAL) == (2,)


def test_no_requests_no_plan() -> None:
    assert LocalPlanSource(CURVE).plan([]) == ()
