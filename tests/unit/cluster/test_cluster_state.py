"""Leases run out, and own ones win over what other schedulers hold."""

import pytest

from dspark_core.cluster.replicas.state import ClusterState
from dspark_core.records import Role
from tests.support.clock import ManualClock
from tests.support.replicas import new_replica


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def state(clock: ManualClock) -> ClusterState:
    return ClusterState(10.0, clock)


def _ids(state: ClusterState, role: Role | None = None) -> list[str]:
    return [replica.replica_id for replica in state.replicas(role)]


def test_a_lease_runs_out_unless_renewed(state: ClusterState, clock: ManualClock):
    state.register(new_replica("a"))
    state.register(new_replica("b"))
    clock.advance(9.9)
    state.register(new_replica("b"))
    assert _ids(state) == ["a", "b"]
    clock.advance(0.1)
    assert _ids(state) == ["b"]


def test_an_expired_replica_goes_from_the_shared_view_too(state: ClusterState, clock: ManualClock):
    """While the registry is down that view stands still and would keep it for ever."""
    state.register(new_replica("a"))
    state.replace_shared([new_replica("a"), new_replica("elsewhere")])
    clock.advance(10)
    assert _ids(state) == ["elsewhere"]
    state.replace_shared([new_replica("a")])
    assert _ids(state) == ["a"]


def test_roles_are_listed_apart(state: ClusterState):
    state.register(new_replica("v"))
    state.register(new_replica("d", role=Role.DRAFTER))
    assert _ids(state, Role.DRAFTER) == ["d"]
    assert _ids(state, Role.VERIFIER) == ["v"]


def test_own_leases_win_over_the_shared_view(state: ClusterState):
    state.replace_shared([new_replica("a", running_requests=9)])
    state.register(new_replica("a", running_requests=1))
    assert [replica.running_requests for replica in state.replicas()] == [1]
