"""Replica ids are addresses, which are used again: a verifier of another kind is another verifier."""

import pytest

from dspark_core.cluster.fleet import Fleet
from dspark_core.cluster.limits import MOST_VERIFIERS
from dspark_core.cluster.planning.curves import CurveBook
from dspark_core.cluster.planning.draft_market import FORGET_SECONDS
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime, VerifierLoad
from tests.support.clock import ManualClock
from tests.support.replicas import new_replica

SMALL = ReplicaKind(model="small", engine="native", hardware="cpu", dtype="float32")
LARGE = ReplicaKind(model="large", engine="native", hardware="cpu", dtype="float32")


def _profile(seconds: float) -> tuple[StepTime, ...]:
    return tuple(
        StepTime(requests=n, batch_tokens=n, context_tokens=0, seconds=seconds * n) for n in (1, 2, 8)
    )


FAST, SLOW = _profile(0.001), _profile(0.1)


def _hello(
    kind: ReplicaKind,
    profile: tuple[StepTime, ...] = (),
    name: str = "v",
    load: VerifierLoad | None = None,
) -> RoundReport:
    return RoundReport(replica_id=name, round=0, profile=profile, kind=kind, load=load)


def _seconds(fleet: Fleet, kind: ReplicaKind) -> float | None:
    pooled = fleet.curves.pooled(kind)
    return None if pooled is None else pooled.seconds(1, 1)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(10.0, ManualClock())


def test_neither_kind_is_judged_by_the_other_s_times(fleet: Fleet):
    fleet.observe(_hello(SMALL, FAST))
    fleet.observe(_hello(LARGE, SLOW))
    assert _seconds(fleet, SMALL) == pytest.approx(0.001)  # what was told of it is still known
    assert _seconds(fleet, LARGE) == pytest.approx(0.1)
    assert fleet.model_of("v") == "large"


def test_who_left_a_kind_does_not_speak_for_it_any_more(fleet: Fleet):
    fleet.observe(_hello(SMALL, FAST))
    fleet.observe(_hello(SMALL, _profile(0.003), name="w"))
    assert _seconds(fleet, SMALL) == pytest.approx(0.002)
    fleet.observe(_hello(LARGE, SLOW))
    assert _seconds(fleet, SMALL) == pytest.approx(0.003)


def test_a_newcomer_without_a_profile_does_not_inherit_the_pace(fleet: Fleet):
    fleet.observe(_hello(SMALL, FAST))
    fleet.observe(_hello(LARGE))
    planner = fleet.planner("v")
    assert planner.pace.round_seconds(1) is None
    assert not planner.pace.profiled
    assert _seconds(fleet, LARGE) is None


def test_a_newcomer_without_a_profile_gets_the_times_of_its_own_kind(fleet: Fleet):
    fleet.observe(_hello(LARGE, SLOW, name="w"))
    fleet.observe(_hello(SMALL, FAST))
    fleet.observe(_hello(LARGE))
    assert fleet.planner("v").pace.round_seconds(1) == pytest.approx(0.1)
    assert [point.seconds for point in fleet.planner("v").missing_curve()] == pytest.approx([0.1, 0.2, 0.8])


def test_a_verifier_that_connects_again_keeps_what_was_learned(fleet: Fleet):
    fleet.observe(_hello(SMALL, FAST))
    planner = fleet.planner("v")
    fleet.observe(_hello(SMALL))
    assert fleet.planner("v") is planner
    assert planner.pace.round_seconds(1) == pytest.approx(0.001)


def test_rounds_count_from_the_beginning_again(fleet: Fleet):
    requests = (RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=0, accepted=0),)
    one = RoundReport(replica_id="v", round=1, requests=requests, batch_tokens=1, step_seconds=0.1)
    fleet.observe(RoundReport(replica_id="v", round=9, requests=requests, batch_tokens=1, step_seconds=0.1))
    fleet.observe(_hello(SMALL, FAST))
    assert not fleet.observe(one)  # an older round of the same verifier
    fleet.observe(_hello(LARGE, SLOW))
    assert fleet.observe(one)


def test_the_load_and_the_cache_of_the_one_before_are_forgotten(fleet: Fleet):
    verifier = new_replica("v")
    fleet.register(verifier)
    fleet.observe(_hello(SMALL, FAST, load=VerifierLoad(running_requests=5)))
    fleet.prefixes.record((1,), "v")
    fleet.observe(_hello(LARGE, SLOW))
    assert fleet.loads.requests(verifier) == 0
    assert fleet.prefixes.matched_tokens((1,)) == {}


def test_a_newcomer_does_not_hang_because_the_one_before_did():
    clock = ManualClock()
    fleet, busy = Fleet(10.0, clock), VerifierLoad(running_requests=1)
    fleet.observe(_hello(SMALL, FAST, load=busy))
    clock.advance(60.0)
    assert fleet.loads.hangs("v", lambda: 0.1)
    fleet.observe(_hello(LARGE, SLOW, load=busy))
    assert not fleet.loads.hangs("v", lambda: 0.1)


def test_one_of_too_many_verifiers_does_not_speak_for_its_kind_any_more(fleet: Fleet):
    fleet.observe(_hello(SMALL, FAST))
    fleet.observe(_hello(SMALL, _profile(0.003), name="w"))
    for number in range(MOST_VERIFIERS - 1):
        fleet.planner(f"further {number}")
    assert _seconds(fleet, SMALL) == pytest.approx(0.003)


def test_what_drafts_brought_the_one_before_is_forgotten():
    clock, told = ManualClock(), dict[str, float | None]()
    fleet = Fleet(10.0, clock, on_price=told.__setitem__)
    requests = (RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=1, accepted=1),)
    for number in range(1, 4):
        for name in ("v", "w"):
            fleet.observe(
                RoundReport(
                    replica_id=name,
                    round=number,
                    requests=requests,
                    batch_tokens=2,
                    step_seconds=0.01,
                    draft_seconds=0.005,
                    draft_compute_seconds=0.004,
                    drafter_id="d" if name == "v" else "e",
                    kind=SMALL,
                    profile=FAST,
                )
            )
    fleet.market.refresh()
    assert told.keys() == {"d", "e"}
    fleet.observe(_hello(LARGE, SLOW))
    clock.advance(FORGET_SECONDS / 2)
    fleet.market.refresh()
    assert told["d"] is None  # nobody asks for it any more
    assert told["e"] is not None


def test_leaving_a_kind_one_never_was_of_changes_nothing():
    book = CurveBook()
    book.leave(SMALL, "v")
    assert book.pooled(SMALL) is None
    pace = VerifierPace()
    pace.adopt(FAST)
    book.join(SMALL, "w", pace)
    book.leave(SMALL, "v")
    pooled = book.pooled(SMALL)
    assert pooled is not None
    assert pooled.seconds(1, 1) == pytest.approx(0.001)


def test_reports_of_another_kind_do_not_keep_what_the_one_before_registered():
    clock = ManualClock()
    fleet = Fleet(10.0, clock)

    def listed() -> list[str]:
        return [replica.model for replica in fleet.state.replicas()]

    fleet.register(new_replica("v", model="small"))
    fleet.observe(RoundReport(replica_id="v", round=0, kind=SMALL))
    clock.advance(6.0)
    fleet.observe(RoundReport(replica_id="v", round=0, kind=LARGE))
    clock.advance(6.0)
    assert listed() == []
    fleet.register(new_replica("v", model="large"))
    clock.advance(6.0)
    fleet.observe(RoundReport(replica_id="v", round=0))
    clock.advance(6.0)
    assert listed() == ["large"]
