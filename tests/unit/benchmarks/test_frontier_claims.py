"""What is claimed of a frontier follows from its points."""

from __future__ import annotations

import pytest

from benchmarks.frontier_parts.claims import Claim, FrontierPoint, check_claims, frontier_of, summarise
from benchmarks.frontier_parts.planners import FixedLengthPlanSource, ThresholdPlanSource
from benchmarks.frontier_parts.stack import SliceResult
from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest


def measured(method: str, concurrency: int, tokens: int, verified: int = 0) -> SliceResult:
    return SliceResult(
        method=method,
        concurrency=concurrency,
        seconds=2.0,
        rounds=10,
        tokens=tokens,
        request_rounds=10 * concurrency,
        drafted=70 * concurrency,
        verified=verified,
        accepted=verified // 2,
        batch_tokens=10 * concurrency + verified,
        step_seconds=1.5,
        draft_seconds=0.4,
    )


def points(speeds: dict[str, dict[int, float]], verified: float = 2.0) -> list[FrontierPoint]:
    return [
        FrontierPoint(
            method=method,
            concurrency=users,
            tokens_per_second=speed,
            tokens_per_second_per_user=speed / users,
            tokens_per_second_range=(speed, speed),
            verify_length=verified / users,
            accepted_length=1.5,
            slices=1,
        )
        for method, row in speeds.items()
        for users, speed in row.items()
    ]


def planned(*survival: list[float]) -> list[PlanRequest]:
    return [PlanRequest(survival=row) for row in survival]


def claims(speeds: dict[str, dict[int, float]]) -> list[Claim]:
    return list(check_claims(points(speeds), scheduled="ours", statics=("mtp", "fixed"), baseline="mtp"))


def test_a_point_is_the_median_slice() -> None:
    slices = [measured("a", 2, tokens, verified=40) for tokens in (100, 300, 120)] + [measured("a", 4, 80)]
    two, four = summarise(slices)
    assert (two.concurrency, two.tokens_per_second, two.tokens_per_second_per_user) == (2, 60.0, 30.0)
    assert two.tokens_per_second_range == (50.0, 150.0)
    assert (two.verify_length, two.accepted_length) == (2.0, 2.0)
    assert four.tokens_per_second == 40.0


def test_between_loads_a_frontier_is_a_line() -> None:
    frontier = frontier_of(points({"a": {1: 40.0, 2: 60.0, 4: 80.0}}), "a")
    assert frontier.fastest_user == 40.0
    assert frontier.throughput_at(30.0) == 60.0
    assert frontier.throughput_at(25.0) == 70.0
    assert frontier.throughput_at(41.0) is None
    assert frontier.throughput_at(1.0) == 80.0
    assert frontier.speed_at(70.0) == 25.0
    assert frontier.speed_at(81.0) is None


def test_a_load_at_which_more_users_get_less_together_does_not_hide_the_better_one() -> None:
    frontier = frontier_of(points({"a": {1: 40.0, 2: 90.0, 4: 60.0}}), "a")
    assert frontier.throughput_at(10.0) == 90.0
    assert frontier.speed_at(60.0) == 45.0


def test_claims_hold_where_the_scheduled_frontier_dominates() -> None:
    found = claims(
        {"ours": {1: 40.0, 2: 60.0, 4: 100.0}, "mtp": {1: 20.0, 2: 30.0, 4: 50.0}, "fixed": {1: 41.0}}
    )
    assert [claim.holds for claim in found] == [True] * 5
    assert "worst -2.4 % (fixed at 1 users)" in found[0].measured


def test_claims_fail_where_it_does_not() -> None:
    found = claims({"ours": {1: 20.0, 2: 30.0}, "mtp": {1: 20.0, 2: 30.0}, "fixed": {2: 40.0}})
    assert [claim.holds for claim in found] == [False, True, False, False, False]


def test_hardly_speculating_at_all_is_not_adapting_to_load() -> None:
    lengths = points({"ours": {1: 20.0, 2: 30.0}}, verified=0.2)
    found = check_claims(lengths, scheduled="ours", statics=(), baseline="mtp")
    assert found[1].holds is False


def test_nothing_measured_is_no_verdict() -> None:
    found = claims({"ours": {1: 20.0}})
    assert [claim.holds for claim in found] == [None, None, None, None, None]


@pytest.mark.parametrize(("length", "lengths"), [(0, (0, 0)), (2, (2, 1)), (9, (3, 1))])
def test_fixed_lengths_end_with_the_draft(length: int, lengths: tuple[int, int]) -> None:
    source = FixedLengthPlanSource(length)
    assert source.plan(planned([0.9, 0.8, 0.1], [0.5])) == lengths
    candidates = [DraftCandidate(sequence_id="a"), DraftCandidate(sequence_id="b", draftable=False)]
    assert source.wants_draft(candidates) == (length > 0, False)


def test_a_threshold_cuts_where_survival_falls_below_it() -> None:
    assert ThresholdPlanSource(0.5).plan(planned([0.9, 0.5, 0.49], [0.4], [])) == (2, 0, 0)
