"""Leases run out, loads count, and the least loaded verifier of a model takes the next request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.errors import UnavailableError
from dspark_core.records import Replica, Role
from services.scheduler.state import ClusterState
from tests.support.clock import ManualClock


def _verifier(replica_id: str, **fields) -> Replica:
    defaults = {"role": Role.VERIFIER, "address": f"{replica_id}:1", "model": "m"}
    return Replica(replica_id=replica_id, **{**defaults, **fields})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def state(clock: ManualClock) -> ClusterState:
    return ClusterState(10.0, clock)


def _ids(state: ClusterState, role: Role | None = None) -> list[str]:
    return [replica.replica_id for replica in state.replicas(role)]


def test_a_lease_runs_out_unless_renewed(state: ClusterState, clock: ManualClock):
    state.register(_verifier("a"))
    state.register(_verifier("b"))
    clock.advance(9.9)
    state.register(_verifier("b"))
    assert _ids(state) == ["a", "b"]
    clock.advance(0.1)
    assert _ids(state) == ["b"]


def test_an_expired_replica_goes_from_the_shared_view_too(state: ClusterState, clock: ManualClock):
    """While the registry is down that view stands still and would keep it for ever."""
    state.register(_verifier("a"))
    state.replace_shared([_verifier("a"), _verifier("elsewhere")])
    clock.advance(10)
    assert _ids(state) == ["elsewhere"]
    state.replace_shared([_verifier("a")])
    assert _ids(state) == ["a"]


def test_roles_are_listed_apart(state: ClusterState):
    state.register(_verifier("v"))
    state.register(_verifier("d", role=Role.DRAFTER))
    assert _ids(state, Role.DRAFTER) == ["d"]
    assert _ids(state, Role.VERIFIER) == ["v"]


def test_own_leases_win_over_the_shared_view(state: ClusterState):
    state.replace_shared([_verifier("a", running_requests=9)])
    state.register(_verifier("a", running_requests=1))
    assert [replica.running_requests for replica in state.replicas()] == [1]


def test_least_load_then_free_kv_then_id(state: ClusterState):
    state.register(_verifier("busy", running_requests=3))
    state.register(_verifier("queued", running_requests=1, waiting_requests=2))
    state.register(_verifier("tight", running_requests=2, free_kv_fraction=0.1))
    state.register(_verifier("z-roomy", running_requests=2, free_kv_fraction=0.9))
    state.register(_verifier("roomy", running_requests=2, free_kv_fraction=0.9))
    assert state.assign("m").replica_id == "roomy"


def test_assignments_count_until_the_replica_reports_its_load(state: ClusterState):
    state.register(_verifier("a"))
    state.register(_verifier("b"))
    assert [state.assign("m").replica_id for _ in range(4)] == ["a", "b", "a", "b"]
    state.register(_verifier("b"))
    assert [state.assign("m").replica_id for _ in range(2)] == ["b", "b"]


def test_drafters_draining_excluded_and_other_models_are_not_chosen(state: ClusterState):
    state.register(_verifier("drafter", role=Role.DRAFTER))
    state.register(_verifier("draining", draining=True))
    state.register(_verifier("other", model="other"))
    state.register(_verifier("failed"))
    state.register(_verifier("fit", running_requests=100))
    assert state.assign("m", {"failed"}).replica_id == "fit"


def test_why_nobody_serves_is_said(state: ClusterState):
    with pytest.raises(UnavailableError, match=r"no verifier serves model 'm' now \(models served: none\)"):
        state.assign("m")
    state.register(_verifier("a", model="other"))
    with pytest.raises(UnavailableError, match=r"models served: other\)"):
        state.assign("m")
    state.register(_verifier("b", draining=True))
    state.register(_verifier("c"))
    with pytest.raises(UnavailableError, match="of 2, 1 are draining and 1 are excluded"):
        state.assign("m", {"c"})


loads = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6)


@given(loads, st.integers(1, 40))
def test_assigning_fills_the_least_loaded_first(initial: list[tuple[int, int]], requests: int):
    """After every assignment the chosen verifier was a least loaded one: water filling."""
    state = ClusterState(10.0, ManualClock())
    load = {}
    for index, (running, waiting) in enumerate(initial):
        replica = _verifier(f"v{index}", running_requests=running, waiting_requests=waiting)
        state.register(replica)
        load[replica.replica_id] = running + waiting
    for _ in range(requests):
        chosen = state.assign("m").replica_id
        assert load[chosen] == min(load.values())
        load[chosen] += 1
