"""Whom to draft for: the best set compared to brute force, and the guarantees of the state machine."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.draft_policy import (
    FIRST_BACKOFF,
    LOOK_ROUNDS,
    MAX_BACKOFF,
    PATIENCE,
    PROBE_ROUNDS,
    PROBED_SHARE,
    DraftCandidate,
    DraftPolicy,
    DraftState,
)
from dspark_core.algorithms.drafting_choice import drafting_order, worth_drafting
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.records import RequestSurvival

STEPS = StepTimeModel.of_curve((1, 64), (0.020, 0.083))  # 1 ms for each further token
TIMES = RoundTimeModel(STEPS, DraftTimeModel((1, 16), (0.010, 0.025)))


def candidates(*names, group="", **fields):
    return [DraftCandidate(sequence_id=name, group=group, **fields) for name in names]


def told(name, survival=(0.9, 0.8), accepted=2):
    return RequestSurvival(
        sequence_id=name,
        survival=survival,
        verify_length=len(survival),
        accepted=min(accepted, len(survival)),
    )


def play(policy, rounds, name="a", *, survival=(0.9, 0.8), accepted=2, group="", times=TIMES):
    """Plays rounds of one request; returns whether each was drafted for."""
    drafted = []
    for _ in range(rounds):
        (wants,) = policy.choose(candidates(name, group=group), times)
        drafted.append(wants)
        if wants:
            policy.learn([told(name, survival, accepted)])
    return drafted


POOR = {"survival": (0.1, 0.01), "accepted": 0}


@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=7),
    st.integers(1, 4),
    st.floats(0.0, 0.05),
    st.sampled_from([0.0, 30.0, 100.0]),
)
def test_the_best_set_is_found_among_requests_that_verify_alike(gains, verified, network, price):
    times = RoundTimeModel(STEPS, TIMES.draft, network)
    lengths = np.full(len(gains), verified)

    def throughput(chosen):
        drafted = sum(chosen)
        tokens = len(gains) + sum(gain for gain, wants in zip(gains, chosen, strict=True) if wants)
        tokens -= price * times.draft.seconds(drafted)
        return tokens / times.seconds(len(gains), len(gains) + verified * drafted, 0, drafted)

    chosen = worth_drafting(np.array(gains), lengths, times, price=price).tolist()
    best = max(throughput(each) for each in product([False, True], repeat=len(gains)))
    assert throughput(chosen) == pytest.approx(best)


def test_whoever_gains_most_for_what_he_adds_to_the_pass_is_drafted_for_first():
    gains, verified = np.array([2.0, 1.5, 0.6, 0.5]), np.array([7.0, 2.0, 0.2, 0.1])
    assert drafting_order(gains, verified).tolist() == [1, 2, 3, 0]


def test_drafts_that_change_nothing_are_not_made():
    free = RoundTimeModel(StepTimeModel.of_curve((1,), (0.02,)))
    assert worth_drafting(np.zeros(3), np.ones(3), free).tolist() == [False] * 3


def test_nobody_is_drafted_for_where_drafting_costs_more_than_it_brings():
    dear = RoundTimeModel(STEPS, DraftTimeModel((1,), (1.0,)))
    assert worth_drafting(np.array([0.9, 0.5]), np.array([1, 1]), dear).tolist() == [False, False]
    assert worth_drafting(np.zeros(0), np.zeros(0), dear).tolist() == []


def test_what_is_not_known_is_tried():
    assert all(play(DraftPolicy(), PATIENCE))


def test_a_gaining_request_is_drafted_for_in_every_round():
    policy = DraftPolicy()
    assert all(play(policy, 500))
    assert policy.state("a") is DraftState.DRAFTING


def test_a_losing_request_is_paused_then_probed_ever_more_rarely():
    policy = DraftPolicy()
    drafted = play(policy, 1200, **POOR)
    assert policy.state("a") is DraftState.PAUSED
    starts = [i for i in range(1, len(drafted)) if drafted[i] and not drafted[i - 1]]
    waits = [after - before for before, after in pairwise(starts)]
    assert starts[0] <= PATIENCE + 1 + FIRST_BACKOFF
    assert waits == sorted(waits)
    assert waits[-1] <= MAX_BACKOFF + PROBE_ROUNDS + 1
    assert sum(drafted) <= PATIENCE + 1 + PROBE_ROUNDS * (len(starts) + 1)


def test_rounds_that_nobody_asked_about_count_as_waiting():
    policies = DraftPolicy(), DraftPolicy()
    for policy in policies:
        play(policy, 100, **POOR)
        assert policy.state("a") is DraftState.PAUSED
    for _ in range(100):
        policies[1].learn([told("a", (), 0)])
    waits = [play(policy, MAX_BACKOFF + 1, **POOR).index(True) for policy in policies]
    assert waits[1] == max(waits[0] - 99, 0)


def test_a_request_that_became_good_is_drafted_for_again_and_its_backoff_reset():
    policy = DraftPolicy()
    play(policy, 60, **POOR)
    play(policy, 600)
    assert all(play(policy, 50))


def test_a_new_request_of_a_losing_kind_waits_with_the_others():
    policy = DraftPolicy()
    play(policy, 100, "old", group="hot", **POOR)
    drafted = []
    for number in range(200):  # short answers: ten rounds each
        drafted += play(policy, 10, f"new{number}", group="hot", **POOR)
    assert sum(drafted) / len(drafted) < 0.03
    assert any(drafted)  # but the group is probed
    assert all(play(policy, 20, "cold", group="cold"))


def test_short_answers_of_a_losing_kind_are_probed_ever_more_rarely():
    policy = DraftPolicy()
    drafted = [sum(play(policy, 40, f"r{index}", **POOR)) for index in range(60)]
    assert drafted[0] > PROBE_ROUNDS  # nothing was known yet
    assert sum(drafted[1:]) <= PROBE_ROUNDS * (60 * 40 / MAX_BACKOFF + 6)


def test_a_probe_is_no_steady_drafting():
    policy = DraftPolicy()
    play(policy, 2)
    assert policy.steady([told("a")])
    play(policy, 4, "b", **POOR)
    while policy.state("b") is not DraftState.PROBING:
        play(policy, 1, "b", **POOR)
    assert not policy.steady([told("a"), told("b")])
    assert policy.steady([])


def test_rounds_of_those_who_may_not_use_drafts_are_no_waiting():
    policy = DraftPolicy()
    play(policy, 4, "a", **POOR)
    for _ in range(2 * MAX_BACKOFF):
        assert policy.choose(candidates("off", draftable=False), TIMES) == (False,)
    assert not any(play(policy, FIRST_BACKOFF - 2, "a", **POOR))


def test_a_lighter_load_brings_drafting_back_at_the_next_look():
    policy = DraftPolicy()
    busy = RoundTimeModel(STEPS, DraftTimeModel((1,), (0.2,)))
    play(policy, 40, times=busy)
    assert policy.state("a") is DraftState.PAUSED
    assert all(play(policy, LOOK_ROUNDS + 20)[LOOK_ROUNDS - 1 :])


def play_together(policy, rounds, names, times=TIMES, **fate):
    """Plays rounds of several requests; returns how many were drafted for in each."""
    drafted = []
    for _ in range(rounds):
        wants = policy.choose(candidates(*names), times)
        drafted.append(sum(wants))
        policy.learn([told(name, **fate) for name, one in zip(names, wants, strict=True) if one])
    return drafted


def test_of_many_that_wait_a_few_are_tried_for_all():
    names = [f"r{number}" for number in range(16)]
    policy = DraftPolicy()
    play_together(policy, 10, names, **POOR)
    drafted = play_together(policy, 600, names, **POOR)
    assert max(drafted) == 16 // PROBED_SHARE
    assert 0 < sum(drafted) / (600 * len(names)) < 0.01


def test_when_one_of_many_turns_out_well_the_others_follow_soon():
    """A draft token costs a quarter of a millisecond, and the text becomes easy to predict."""
    cheap = RoundTimeModel(StepTimeModel.of_curve((1, 64), (0.020, 0.036)))
    names = [f"r{number}" for number in range(16)]
    policy = DraftPolicy()
    play_together(policy, 200, names, cheap, **POOR)
    drafted = play_together(policy, MAX_BACKOFF + 100, names, cheap, survival=(0.9, 0.8), accepted=2)
    began = next(index for index, count in enumerate(drafted) if count)
    assert began <= MAX_BACKOFF
    assert min(drafted[began + 30 :]) >= len(names) - 1  # one that was unlucky waits a little longer
    assert drafted[-1] == len(names)


def test_promises_that_are_not_kept_are_not_believed():
    policy = DraftPolicy()
    assert sum(play(policy, 100, survival=(0.9, 0.8), accepted=0)) < 25


def test_a_floor_that_plain_rounds_do_not_hold_keeps_its_drafts():
    policy = DraftPolicy()
    for _ in range(100):
        slow, promised = candidates("a"), candidates("b", floor_tokens_per_second=60.0)
        wants = policy.choose([*slow, *promised], TIMES)
        policy.learn([told(n, **POOR) for n, w in zip("ab", wants, strict=True) if w])
    assert wants[1]


def test_what_may_not_be_drafted_never_is():
    policy = DraftPolicy()
    for _ in range(10):
        assert policy.choose(candidates("a", draftable=False), TIMES) == (False,)


def test_sequences_are_forgotten_in_the_end():
    policy = DraftPolicy()
    play(policy, 5, "first", **POOR)
    for number in range(5000):
        policy.choose(candidates(f"n{number}"), TIMES)
    assert policy.state("first") is None
    assert policy.state("n4999") is not None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=60))
def test_this_rounds_draft_decides_nothing_about_this_round(history):
    """Two policies with equal histories decide alike; a draft's content is reported only afterwards."""
    policy, twin = DraftPolicy(), DraftPolicy()
    for good, accepted in history:
        answer = policy.choose(candidates("a"), TIMES)
        assert answer == twin.choose(candidates("a"), TIMES)
        if answer[0]:
            for each in (policy, twin):
                each.learn([told("a", (0.9, 0.8) if good else (0.1, 0.01), accepted)])
