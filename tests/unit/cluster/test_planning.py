"""Curves are learned from steps; plans come from the newest round and never from nothing."""

import itertools
from dataclasses import replace

import pytest

from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.cluster.planning.planner import VerifierPlanner
from dspark_core.errors import InvalidRequestError
from dspark_core.records import RequestSurvival, RoundReport, ScalingBand, StepTime


def _true_seconds(batch_tokens: int) -> float:
    """Flat up to 16 tokens, then 1 ms for each further one."""
    return 0.020 + 0.001 * max(0, batch_tokens - 16)


def _report(round_: int, survival=((0.9, 0.8),), **fields) -> RoundReport:
    requests = tuple(
        RequestSurvival(sequence_id=str(index), survival=tuple(row), verify_length=0, accepted=0)
        for index, row in enumerate(survival)
    )
    return RoundReport(replica_id="v", round=round_, requests=requests, **fields)


def _profile(*points: tuple[int, float]) -> tuple[StepTime, ...]:
    return tuple(
        StepTime(requests=1, batch_tokens=tokens, context_tokens=0, seconds=seconds)
        for tokens, seconds in points
    )


def test_a_pace_is_learned_without_a_profile():
    pace = VerifierPace()
    assert pace.round_seconds(1) is None
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64]
    for batch_tokens in itertools.islice(itertools.cycle(sizes), 2000):
        rows = ((),) * batch_tokens
        pace.observe(
            _report(1, survival=rows, batch_tokens=batch_tokens, step_seconds=_true_seconds(batch_tokens))
        )
    for requests in sizes:
        assert pace.round_seconds(requests) == pytest.approx(_true_seconds(requests), rel=0.1)


def test_a_round_takes_what_passes_between_steps_too():
    """A tenth and more of it, on a processor: floors would break that hold by the steps alone."""
    pace = VerifierPace()
    pace.adopt(_profile((1, 0.01), (2, 0.01), (64, 0.05)))
    for _ in range(400):
        report = _report(1, survival=((),) * 2, batch_tokens=2, step_seconds=0.01, loop_seconds=0.003)
        pace.observe(report)
    assert pace.round_seconds(2) == pytest.approx(0.013, rel=0.02)


def test_a_throttled_verifier_is_slow_within_a_second_of_rounds():
    pace = VerifierPace()
    pace.adopt(_profile((1, 0.02), (64, 0.08)))
    before = pace.round_seconds(4)
    for _ in range(20):  # 20 rounds of 80 ms: 1.6 s
        pace.observe(_report(1, survival=((),) * 4, batch_tokens=4, step_seconds=0.08))
    after = pace.round_seconds(4)
    assert before is not None
    assert after is not None
    assert after > 2 * before


def test_a_throttled_verifier_is_planned_shorter_within_a_second_of_rounds():
    """Its drafts cost what they did, so a round that grew by its steps pays for fewer of their tokens."""
    rows = tuple(tuple(confidence**k for k in range(1, 8)) for confidence in (0.5, 0.6, 0.7, 0.8))
    planner = VerifierPlanner()
    planner.pace.adopt(_profile((4, 0.02), (32, 0.04)))

    def capacity(first_round: int, slowdown: float) -> int:
        for number in range(first_round, first_round + 20):
            seconds = slowdown * (0.02 + 0.02 * 12 / 28)
            report = _report(number, rows, batch_tokens=16, step_seconds=seconds, draft_seconds=0.02)
            lengths = [replace(request, verify_length=3) for request in report.requests]
            planner.observe(replace(report, requests=tuple(lengths)))
        plan = planner.plan()
        assert plan is not None
        return plan.draft_token_capacity

    before = capacity(1, 1.0)
    assert 0 < capacity(21, 4.0) < before


def _capacity(profile: tuple[StepTime, ...], rows, floor: float = 0.0, scalings=(), **fields) -> int:
    """`floor` of the first request."""
    planner = VerifierPlanner()
    planner.pace.adopt(profile)
    report = _report(1, rows, batch_tokens=8, draft_seconds=0.010, **fields)
    told = [replace(request, verify_length=1) for request in report.requests]
    told[0] = replace(told[0], min_tokens_per_second=floor)
    planner.observe(replace(report, requests=tuple(told)))
    plan = planner.plan(scalings)
    assert plan is not None
    return plan.draft_token_capacity


def test_an_overconfident_drafter_gets_fewer_tokens_verified():
    """Tokens that seem worth 0.9, 0.8 and 0.6 are worth half a token each: the third no longer pays."""
    slope, rows = _profile((4, 0.010), (16, 0.020)), ((0.9, 0.72, 0.43),) * 4
    halved = ScalingBand(up_to_temperature=0.0, temperatures=(1.0,) * 3, biases=(-2.2, -1.4, -0.4))
    assert _capacity(slope, rows, step_seconds=0.012) == 12
    assert 0 < _capacity(slope, rows, step_seconds=0.012, scalings=(halved,)) < 12


def test_a_cohort_is_planned_for_by_what_the_other_does_not_hide():
    """A step that takes twice as long from the ninth token on pays behind a wait for drafts, not without."""
    stairs, rows = _profile((4, 0.010), (8, 0.010), (9, 0.020), (16, 0.020)), ((0.9, 0.8, 0.5),) * 4
    assert _capacity(stairs, rows, step_seconds=0.010) == 12
    assert _capacity(stairs, rows, step_seconds=0.010, cohorts=2, hidden_draft_seconds=0.010) == 4


def test_a_floor_asks_twice_as_much_of_a_cohort():
    """1.9 tokens in 12.4 ms of every second round are 76.6 a second."""
    slope, rows = _profile((4, 0.0100), (12, 0.0148)), ((0.9, 0.2),) * 4
    in_turns = {"step_seconds": 0.0124, "cohorts": 2, "hidden_draft_seconds": 0.010}
    assert _capacity(slope, rows, floor=76.0, **in_turns) == 4
    assert _capacity(slope, rows, floor=78.0, **in_turns) == 5


def test_a_request_waits_for_both_cohorts():
    pace = VerifierPace()
    pace.adopt(_profile((1, 0.010), (64, 0.010)))
    rows = ((),) * 4
    assert pace.round_seconds(8) == pytest.approx(0.010)
    pace.observe(_report(1, rows, batch_tokens=4, step_seconds=0.010, cohorts=2))
    assert pace.round_seconds(8) == pytest.approx(0.020)
    assert pace.round_seconds(1) == pytest.approx(0.010)


def test_nothing_is_planned_from_nothing():
    planner = VerifierPlanner()
    assert planner.plan() is None
    planner.observe(_report(1))  # no timed step: no curve
    assert planner.plan() is None
    planner.observe(_report(2, survival=((), ()), batch_tokens=2, step_seconds=0.01))  # no drafts
    assert planner.plan() is None
    planner.observe(_report(3, survival=(), batch_tokens=2, step_seconds=0.01))  # no requests
    assert planner.plan() is None


FLAT = _profile((1, 0.02), (64, 0.02))
STEEP = _profile((1, 0.001), (2, 10.0))


def test_free_steps_verify_everything_and_costly_ones_nothing():
    for profile, capacity in ((FLAT, 4), (STEEP, 0)):
        planner = VerifierPlanner()
        planner.pace.adopt(profile)
        planner.observe(_report(7, survival=((0.9, 0.8), (0.5, 0.1))))
        plan = planner.plan()
        assert plan is not None
        assert (plan.based_on_round, plan.draft_token_capacity) == (7, capacity)


def test_draft_time_makes_longer_rounds_worth_their_wait():
    """A token that does not pay by the pass alone pays when every round also waits for drafts."""
    profile = _profile((1, 0.010), (2, 0.018), (3, 0.026))
    capacities = []
    for draft_seconds in (0.0, 0.1):
        planner = VerifierPlanner()
        planner.pace.adopt(profile)
        planner.observe(_report(1, survival=((0.7, 0.5),), draft_seconds=draft_seconds))
        plan = planner.plan()
        assert plan is not None
        capacities.append(plan.draft_token_capacity)
    assert capacities == [0, 2]


def test_older_rounds_are_ignored_until_a_new_stream_begins():
    planner = VerifierPlanner()
    planner.pace.adopt(FLAT)
    assert planner.observe(_report(5))
    assert not planner.observe(_report(5))
    assert not planner.observe(_report(4))
    planner.begin_stream()
    assert planner.plan() is None
    assert planner.observe(_report(1))
    plan = planner.plan()
    assert plan is not None  # the curve outlived the stream
    assert plan.based_on_round == 1


def test_a_repeated_profile_does_not_undo_what_was_learned():
    pace = VerifierPace()
    pace.adopt(FLAT)
    for _ in range(100):
        pace.observe(_report(1, survival=((),), batch_tokens=1, step_seconds=0.06))
    learned = pace.round_seconds(1)
    pace.adopt(FLAT)
    assert pace.round_seconds(1) == learned == pytest.approx(0.06, rel=0.05)


def test_a_round_that_prefilled_says_nothing_about_decoding():
    pace = VerifierPace()
    pace.adopt(FLAT)
    pace.observe(_report(1, survival=((),), batch_tokens=200, step_seconds=2.0))
    assert pace.round_seconds(1) == pytest.approx(0.02)


def test_a_profile_that_names_a_shape_twice_is_the_verifiers_mistake():
    pace = VerifierPace()
    twice = tuple(
        StepTime(requests=1, batch_tokens=1, context_tokens=context, seconds=0.01) for context in range(100)
    )
    with pytest.raises(InvalidRequestError, match="profile: points must differ") as caught:
        pace.adopt(twice)
    assert caught.value.field == "profile"
    assert not pace.profiled
