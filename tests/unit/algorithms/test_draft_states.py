"""The draft policy step by step: how long it is patient, waits and probes, and what it expects of a draft."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from dspark_core.algorithms.draft_policy import (
    FIRST_BACKOFF,
    GROUP_RATE,
    LOOK_ROUNDS,
    MAX_BACKOFF,
    PATIENCE,
    PROBE_ROUNDS,
    RATE,
    TRUST_MEMORY,
    TRUST_PRIOR,
    UNKNOWN_GAIN,
    UNKNOWN_VERIFIED,
    DraftCandidate,
    DraftPolicy,
    DraftState,
)
from dspark_core.algorithms.drafting_choice import better_looked_up
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.records import DraftOrigin, RequestSurvival

STEPS = StepTimeModel.of_curve((1, 64), (0.020, 0.083))  # 1 ms for each further token
CHEAP = RoundTimeModel(STEPS, DraftTimeModel((1, 16), (0.010, 0.025)))
DEAR = RoundTimeModel(STEPS, DraftTimeModel((1,), (10.0,)))
FREE = RoundTimeModel(StepTimeModel.of_curve((1, 64), (0.020, 0.0515)))  # to draft; tokens cost 0.5 ms
GOOD, POOR = ((0.9, 0.8), 2), ((0.1, 0.01), 0)


def told(name: str, survival: tuple[float, ...], accepted: int) -> RequestSurvival:
    return RequestSurvival(
        sequence_id=name, survival=survival, verify_length=len(survival), accepted=accepted
    )


def one(name: str = "a", **fields) -> DraftCandidate:
    return DraftCandidate(sequence_id=name, **fields)


def played(
    policy: DraftPolicy, rounds: int, fate, name: str = "a", times: RoundTimeModel = CHEAP
) -> list[bool]:
    drafted = []
    for _ in range(rounds):
        (wants,) = policy.choose([one(name)], times)
        drafted.append(wants)
        policy.learn([told(name, *(fate if wants else ((), 0)))])
    return drafted


def play_until(state: DraftState, policy: DraftPolicy, fate) -> None:
    for _ in range(2 * MAX_BACKOFF):
        played(policy, 1, fate)
        if policy.state("a") is state:
            return
    pytest.fail(f"never {state}")


def runs(drafted: list[bool]) -> list[tuple[bool, int]]:
    return [(wants, len(list(group))) for wants, group in groupby(drafted)]


def test_patience_and_waits_are_as_long_as_stated() -> None:
    waits = [FIRST_BACKOFF * 2**power for power in range(5)] + [MAX_BACKOFF] * 2
    assert waits[4] == MAX_BACKOFF
    expected = [(True, PATIENCE)]
    for wait in waits:
        expected += [(False, wait), (True, PROBE_ROUNDS)]
    assert runs(played(DraftPolicy(), PATIENCE + sum(waits) + PROBE_ROUNDS * len(waits), POOR)) == expected


def test_one_round_that_pays_starts_patience_over() -> None:
    policy = DraftPolicy()
    played(policy, 1, GOOD)
    for times in [*[DEAR] * (PATIENCE - 1), CHEAP] * 3:
        assert played(policy, 1, GOOD, times=times) == [True]
    assert not any(played(policy, PATIENCE + 1, GOOD, times=DEAR)[PATIENCE - 1 :])


def test_the_first_wait_after_good_drafts_is_short_again() -> None:
    policy = DraftPolicy()
    played(policy, 150, POOR)
    play_until(DraftState.DRAFTING, policy, GOOD)
    waits = [count for wants, count in runs(played(policy, 80, POOR)) if not wants]
    assert waits[0] == FIRST_BACKOFF


def test_a_request_that_arrives_while_its_group_waits_waits_as_long() -> None:
    policy = DraftPolicy()
    played(policy, PATIENCE + 6, POOR)  # the pause began five rounds ago
    assert played(policy, FIRST_BACKOFF, POOR, "b").index(True) + 1 == FIRST_BACKOFF - 5


def expected(policy: DraftPolicy, name: str, **fields) -> tuple[float, float]:
    gains, verified = policy.prospects([one(name, **fields)])
    return float(gains[0]), float(verified[0])


def test_a_draft_promises_the_tokens_that_were_verified() -> None:
    policy = DraftPolicy()
    policy.choose([one()], CHEAP)
    policy.learn([RequestSurvival(sequence_id="a", survival=(0.9, 0.8, 0.7), verify_length=1, accepted=1)])
    trust = (1.0 + TRUST_PRIOR) / (0.9 + TRUST_PRIOR)
    assert expected(policy, "a") == pytest.approx((0.9 * trust, 1.0))
    assert expected(policy, "a", draftable=False) == (0.0, 0.0)


def test_trust_is_the_recent_share_of_promises_kept() -> None:
    policy = DraftPolicy()
    policy.choose([one()], CHEAP)
    accepted = promised = 0.0
    for kept in (0, 0, 1, 0, 1, 1):
        policy.learn([told("a", (0.5,), kept)])
        accepted, promised = TRUST_MEMORY * accepted + kept, TRUST_MEMORY * promised + 0.5
        trust = (accepted + TRUST_PRIOR) / (promised + TRUST_PRIOR)
        assert expected(policy, "a")[0] == pytest.approx(0.5 * trust)


def test_a_request_learns_faster_than_its_group_and_on_its_own() -> None:
    policy = DraftPolicy()
    policy.choose([one()], CHEAP)
    policy.learn([told("a", (0.5,), 1)])
    policy.choose([one("a"), one("b")], CHEAP)  # b starts from the group's means
    policy.learn([told("b", (1.0,), 1)])
    group = 0.5 + GROUP_RATE * 0.5
    known = {"a": 0.5, "b": 0.5 + RATE * 0.5, "new": group}
    gains = {name: expected(policy, name)[0] for name in known}
    assert {name: gain / gains["a"] for name, gain in gains.items()} == pytest.approx(
        {name: gain / 0.5 for name, gain in known.items()}
    )


def test_drafts_asked_for_in_vain_are_no_steady_drafting() -> None:
    policy = DraftPolicy()
    policy.choose([one("a"), one("off", draftable=False)], CHEAP)
    assert policy.steady([told("a", *GOOD), told("off", (), 0)])
    assert not policy.steady([told("a", (), 0), told("off", (), 0)])
    looked_up = RequestSurvival(
        sequence_id="a", survival=(0.9,), verify_length=1, accepted=1, origin=DraftOrigin.LOOKUP
    )
    assert policy.steady([looked_up])


def test_a_request_with_better_looked_up_tokens_takes_no_draft_and_no_step() -> None:
    policy = DraftPolicy()
    played(policy, PATIENCE + 1, POOR)
    likely = tuple(0.95**k for k in range(1, 8))
    for _ in range(3 * FIRST_BACKOFF):
        assert policy.choose([one(lookup_survival=likely)], CHEAP) == (False,)
        policy.learn([told("a", (), 0)])
    assert policy.state("a") is DraftState.PAUSED
    assert played(policy, 1, POOR) == [False]


def test_a_paused_request_with_a_floor_is_looked_at_in_every_round() -> None:
    """Its floor makes a draft worthwhile at once; without one the next look may be rounds away."""
    waits = []
    for floor in (None, 60.0):
        policy = DraftPolicy()
        played(policy, LOOK_ROUNDS, POOR)  # the last of them was a look
        rounds = 0
        while not policy.choose([one(floor_tokens_per_second=floor)], CHEAP)[0]:
            policy.learn([told("a", (), 0)])
            rounds += 1
        waits.append(rounds)
    assert waits[1] == 0 < LOOK_ROUNDS < waits[0]


def test_what_may_not_be_drafted_does_not_stand_for_others() -> None:
    """A draft pays only for both: one alone does not bring the fixed part of drafting back."""
    policy = DraftPolicy()
    times = RoundTimeModel(STEPS, DraftTimeModel((1,), (0.014,)))
    for _ in range(4 * LOOK_ROUNDS):
        policy.choose([one("a"), one("b")], CHEAP)
        policy.learn([told(name, (0.9, 0.5), 1) for name in "ab"])
    both = [policy.choose([one("a"), one("b")], times) for _ in range(2 * PATIENCE)]
    assert both[-1] == (True, True)
    alone = [policy.choose([one("a"), one("b", draftable=False)], times) for _ in range(2 * PATIENCE)]
    assert alone[-1] == (False, False)


def played_together(policy: DraftPolicy, names: list[str], fate, times: RoundTimeModel = FREE) -> int:
    """One round of several requests; how many were drafted for."""
    wants = policy.choose([one(name) for name in names], times)
    policy.learn([told(n, *(fate if wanted else ((), 0))) for n, wanted in zip(names, wants, strict=True)])
    return sum(wants)


def test_while_there_is_hope_the_next_probe_waits_for_the_last_alone() -> None:
    policy, names = DraftPolicy(), [f"r{number}" for number in range(6)]
    for _ in range(3 * FIRST_BACKOFF):
        played_together(policy, names, POOR)
    for _ in range(MAX_BACKOFF):
        played_together(policy, names, GOOD)
        if any(policy.state(name) is DraftState.DRAFTING for name in names):
            break
    played_together(policy, names, GOOD)
    assert any(policy.state(name) is DraftState.PROBING for name in names)
    waiting = [name for name in names if policy.state(name) is DraftState.PAUSED]  # the others end early
    assert waiting
    assert [bool(played_together(policy, waiting, GOOD)) for _ in range(3)] == [False, False, True]


def test_hope_ends_with_the_drafting_that_gave_it() -> None:
    policy = DraftPolicy()
    played(policy, FIRST_BACKOFF, POOR)
    play_until(DraftState.DRAFTING, policy, GOOD)
    play_until(DraftState.PAUSED, policy, POOR)
    several = ["a", *(f"r{number}" for number in range(7))]
    probes = [played_together(policy, several, POOR, CHEAP) for _ in range(FIRST_BACKOFF + 1)]
    assert max(probes) == 1  # of eight, not half of them


@pytest.mark.parametrize("share", [place / 40 for place in range(1, 40)])
def test_unknown_drafts_are_compared_with_looked_up_tokens_as_assumed(share: float) -> None:
    lookup = (share, share * share)
    better = better_looked_up(
        [lookup] * 2, np.full(2, UNKNOWN_GAIN), np.full(2, UNKNOWN_VERIFIED), CHEAP, price=20.0
    )
    asked = DraftPolicy().choose([one(n, lookup_survival=lookup) for n in "ab"], CHEAP, price=20.0)
    assert [not wants for wants in asked] == better.tolist()
