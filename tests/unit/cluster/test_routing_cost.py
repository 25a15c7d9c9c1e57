"""What routing keeps from one request to the next costs less and changes no choice."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.step_surface import StepSurface
from dspark_core.cluster.fleet import Fleet
from dspark_core.cluster.replicas.state import ClusterState
from dspark_core.errors import DSparkError
from dspark_core.records import (
    AssignRequest,
    Replica,
    ReplicaKind,
    RequestSurvival,
    Role,
    RoundReport,
    StepTime,
    VerifierLoad,
)
from tests.support.clock import ManualClock
from tests.support.replicas import new_replica

NAMES = ("a", "b", "c")
KIND = ReplicaKind(model="m", engine="e", hardware="h", dtype="d")
LEASE_SECONDS = 10.0
SECONDS = {1: 0.01, 2: 0.013, 4: 0.012, 8: 0.03}  # not monotone: profiles are noisy

Event = Callable[[Fleet], object]


def _register(name: str, running: int, draining: bool) -> Event:
    replica = new_replica(name, running_requests=running, draining=draining)
    return lambda fleet: fleet.register(replica)


def _profiled(name: str, factor: float) -> Event:
    """A stream's first report; without a profile if `factor` is 0."""
    profile = tuple(
        StepTime(
            requests=n, batch_tokens=n * t, context_tokens=n * 64, seconds=factor * seconds * (0.8 + 0.2 * t)
        )
        for n, seconds in SECONDS.items()
        for t in (1, 3)
        if factor
    )
    load = VerifierLoad(max_running_requests=8)
    report = RoundReport(replica_id=name, round=0, kind=KIND, profile=profile, load=load)
    return lambda fleet: fleet.observe(report)


def _told(name: str, running: int, floors: list[float]) -> Event:
    load = VerifierLoad(running_requests=running, max_running_requests=8, speed_floors=tuple(floors))
    return lambda fleet: fleet.observe(RoundReport(replica_id=name, round=0, load=load))


def _round(name: str, number: int, requests: int, verified: int, seconds: float) -> Event:
    report = RoundReport(
        replica_id=name,
        round=number,
        requests=tuple(
            RequestSurvival(
                sequence_id=str(i), survival=(0.9,) * verified, verify_length=verified, accepted=0
            )
            for i in range(requests)
        ),
        batch_tokens=requests * (1 + verified),
        step_seconds=seconds,
        draft_seconds=0.004,
        draft_compute_seconds=0.003,
        context_tokens=requests * 80,
    )
    return lambda fleet: fleet.observe(report)


def _events() -> st.SearchStrategy[Event | AssignRequest | float]:
    names, counts = st.sampled_from(NAMES), st.integers(0, 9)
    floors = st.sampled_from((0.0, 20.0, 60.0))
    asked = st.builds(
        AssignRequest,
        request_id=st.uuids().map(str),
        model=st.just("m"),
        prompt_tokens=st.sampled_from((0, 40, 900)),
        prefix_hashes=st.lists(st.integers(1, 3), max_size=3).map(tuple),
        exclude_replica_ids=st.lists(names, max_size=1).map(tuple),
        min_tokens_per_second=floors,
        floor_promised=st.booleans(),
    )
    return st.one_of(
        asked,
        asked,
        st.sampled_from((0.05, 1.5, 6.0)),  # seconds that pass
        st.builds(_register, names, counts, st.booleans()),
        st.builds(_profiled, names, st.sampled_from((0.0, 0.5, 1.0, 2.0))),
        st.builds(_told, names, counts, st.lists(floors.filter(bool), max_size=2)),
        st.builds(
            _round, names, st.integers(1, 99), st.integers(1, 5), st.integers(0, 3), st.floats(0.005, 0.08)
        ),
        st.builds(lambda name: lambda fleet: fleet.deregister(name), names),
        st.builds(lambda name: lambda fleet: fleet.loads.disconnected(name), names),
        st.builds(
            lambda names: lambda fleet: fleet.state.replace_shared(new_replica(n) for n in names),
            st.lists(names, unique=True),
        ),
    )


def _choice(fleet: Fleet, request: AssignRequest) -> str | None:
    try:
        chosen = fleet.assign(request)
    except DSparkError as error:
        return str(error)
    return chosen and chosen.replica_id


def _estimates(fleet: Fleet) -> list[tuple[float | None, ...]]:
    paces = [fleet.planner(name).pace for name in NAMES]
    return [(pace.round_seconds(1), pace.round_seconds(3), pace.prefill_seconds(900)) for pace in paces]


@given(st.lists(_events(), max_size=40))
@example([_round("a", 1, 2, 1, 0.02), _profiled("a", 0.0)])
@settings(max_examples=60, deadline=None)
def test_kept_estimates_and_the_choices_they_lead_to_are_those_of_new_ones(
    events: list[Event | AssignRequest | float],
) -> None:
    """Compares with a fleet that hears and is asked the same, but estimates anew each time."""
    clock = ManualClock()
    fleet, forgetful = Fleet(LEASE_SECONDS, clock), Fleet(LEASE_SECONDS, clock)
    start = [*(_register(name, 0, False) for name in NAMES), *(_profiled(name, 1.0) for name in NAMES[1:])]
    for event in (*start, *events):
        for name in NAMES:
            forgetful.planner(name).pace.forget_estimates()
        if isinstance(event, AssignRequest):
            assert _choice(fleet, event) == _choice(forgetful, event)
        elif isinstance(event, float):
            clock.advance(event)
        else:
            event(fleet)
            event(forgetful)
        for name in NAMES:
            forgetful.planner(name).pace.forget_estimates()
        assert _estimates(fleet) == _estimates(forgetful)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("register", "extend", "deregister", "share", "advance")),
            st.sampled_from(NAMES),
            st.integers(0, 2),
        )
    )
)
def test_replicas_are_those_of_leases_and_the_shared_view(
    steps: list[tuple[str, str, int]],
) -> None:
    clock = ManualClock()
    state = ClusterState(LEASE_SECONDS, clock)
    leases: dict[str, tuple[Replica, float]] = {}
    shared: dict[str, Replica] = {}
    for act, name, number in steps:
        replica = new_replica(name, running_requests=number, role=Role.DRAFTER if number else Role.VERIFIER)
        before, changes = {one.replica_id: one.role for one in state.replicas()}, state.changes
        if act == "register":
            state.register(replica)
            leases[name] = (replica, clock() + LEASE_SECONDS)
        elif act == "extend":
            state.extend_lease(name)
            if name in leases:
                leases[name] = (leases[name][0], clock() + LEASE_SECONDS)
        elif act == "deregister":
            state.deregister(name)
            leases.pop(name, None)
            shared.pop(name, None)
        elif act == "share":
            shared = {one: new_replica(one, running_requests=9) for one in NAMES[number:]}
            state.replace_shared(shared.values())
        else:
            clock.advance(4.0)
        for gone in [one for one, (_, until) in leases.items() if until <= clock()]:
            del leases[gone]
            shared.pop(gone, None)
        expected = shared | {one: held for one, (held, _) in leases.items()}
        assert state.replicas() == tuple(expected[one] for one in sorted(expected))
        assert state.replicas(Role.DRAFTER) == tuple(r for r in state.replicas() if r.role is Role.DRAFTER)
        if {one.replica_id: one.role for one in state.replicas()} != before:
            assert state.changes > changes


def test_step_times_are_estimated_once_between_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    estimated, at = Counter[str](), StepSurface.at

    def counted(self: StepSurface, *args) -> float:
        estimated["steps"] += 1
        return at(self, *args)

    monkeypatch.setattr(StepSurface, "at", counted)
    clock = ManualClock()
    fleet = Fleet(LEASE_SECONDS, clock)
    for name in NAMES:
        for event in (_register(name, 0, False), _profiled(name, 1.0), _told(name, 3, [5.0])):
            event(fleet)

    def ask(times: int) -> int:
        before = estimated["steps"]
        for number in range(times):
            fleet.assign(AssignRequest(request_id=f"r{number}", model="m", prompt_tokens=900))
            fleet.loads.update("a", VerifierLoad(running_requests=3, new_request_ids=(f"r{number}",)))
        return estimated["steps"] - before

    assert 0 < ask(len(NAMES)) < 30
    for name in NAMES:
        _told(name, 3, [5.0])(fleet)
    assert ask(50) <= 30
    _round("a", 1, 3, 0, 0.02)(fleet)
    assert ask(1)
