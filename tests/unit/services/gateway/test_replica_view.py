"""Without the scheduler, requests are spread as it last spread them, and evenly once that is old."""

import pytest

from dspark_core.records import Replica, Role
from services.gateway.verifiers.replica_view import FORGET_SECONDS, MAX_RATIO, ReplicaView
from tests.support.clock import ManualClock

FAST, SLOW = (Replica(replica_id=name, role=Role.VERIFIER, address=name, model="m") for name in ("f", "s"))


def spread(view: ReplicaView, requests: int) -> dict[str, int]:
    """How many of these requests, none of which ends, go to each replica."""
    counts = {"f": 0, "s": 0}
    for _ in range(requests):
        chosen = view.choose(())
        assert chosen is not None
        view.started(chosen.replica_id)
        counts[chosen.replica_id] += 1
    return counts


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def view(clock: ManualClock) -> ReplicaView:
    one = ReplicaView(clock)
    one.update([FAST, SLOW])
    return one


def test_a_gateway_that_knows_nothing_spreads_evenly(view: ReplicaView):
    assert spread(view, 20) == {"f": 10, "s": 10}


def test_the_schedulers_spread_goes_on_without_it(view: ReplicaView):
    for replica in (FAST, FAST, FAST, SLOW) * 4:
        view.chosen(replica)
    assert spread(view, 40) == {"f": 30, "s": 10}


def test_one_it_avoided_still_gets_a_share(view: ReplicaView):
    view.chosen(FAST)
    assert spread(view, 10 * round(1 + MAX_RATIO)) == {"f": 10 * MAX_RATIO, "s": 10}


def test_old_knowledge_fades(view: ReplicaView, clock: ManualClock):
    for _ in range(8):
        view.chosen(FAST)
    clock.advance(20 * FORGET_SECONDS)
    assert spread(view, 20) == {"f": 10, "s": 10}


def test_requests_that_ended_weigh_on_nobody(view: ReplicaView):
    for _ in range(3):
        assert spread(view, 1) == {"f": 1, "s": 0}
        view.ended("f")


def test_an_excluded_favourite_does_not_count(view: ReplicaView):
    view.chosen(FAST)
    assert view.choose(("f",)) is SLOW
    view.suspect("s")
    assert view.choose(("f",)) is SLOW
    assert view.choose(()) is FAST
