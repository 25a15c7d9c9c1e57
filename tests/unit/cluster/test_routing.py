"""Requests go where they are expected to be done first: load, pace, prefixes, health."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.prefix_hashes import BLOCK_TOKENS, prefix_hashes
from dspark_core.cluster.fleet import Fleet
from dspark_core.cluster.replicas.loads import PENDING_SECONDS
from dspark_core.cluster.replicas.prefixes import REPLICAS_PER_PREFIX, PrefixTable
from dspark_core.errors import UnavailableError
from dspark_core.records import (
    AssignRequest,
    RequestSurvival,
    Role,
    RoundReport,
    StepTime,
    VerifierLoad,
)
from tests.support.clock import ManualClock
from tests.support.replicas import new_replica

SLOPE = tuple(
    StepTime(requests=requests, batch_tokens=tokens, context_tokens=0, seconds=seconds)
    for requests, tokens, seconds in ((1, 1, 0.021), (16, 16, 0.036), (64, 64, 0.084), (1, 256, 0.2))
)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def fleet(clock: ManualClock) -> Fleet:
    return Fleet(10.0, clock)


class Asker:
    """Asks for one verifier after another, each for a request of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._count = 0

    def __call__(self, *, prompt: tuple[int, ...] = (), exclude: tuple[str, ...] = ()) -> str:
        self._count += 1
        request = AssignRequest(
            request_id=f"r{self._count}",
            model="m",
            prompt_tokens=len(prompt),
            prefix_hashes=prefix_hashes(prompt),
            exclude_replica_ids=exclude,
        )
        return self._fleet.assign(request).replica_id


@pytest.fixture
def ask(fleet: Fleet) -> Asker:
    return Asker(fleet)


def _report(fleet: Fleet, name: str, *, running: int = 0, profile=(), **load) -> None:
    load = VerifierLoad(running_requests=running, **load)
    fleet.observe(RoundReport(replica_id=name, round=0, load=load, profile=profile))


def _rounds(fleet: Fleet, name: str, count: int, seconds: float, *, start: int = 1) -> None:
    for number in range(start, start + count):
        request = RequestSurvival(sequence_id="s", survival=(), verify_length=0, accepted=0)
        fleet.observe(
            RoundReport(
                replica_id=name, round=number, requests=(request,), batch_tokens=1, step_seconds=seconds
            )
        )


def test_least_load_then_free_kv_then_id_while_no_curve_is_known(fleet: Fleet, ask: Asker):
    fleet.register(new_replica("busy", running_requests=3))
    fleet.register(new_replica("queued", running_requests=1, waiting_requests=2))
    fleet.register(new_replica("tight", running_requests=2, free_kv_fraction=0.1))
    fleet.register(new_replica("z-roomy", running_requests=2, free_kv_fraction=0.9))
    fleet.register(new_replica("roomy", running_requests=2, free_kv_fraction=0.9))
    assert ask() == "roomy"


def test_assignments_count_until_the_replica_renews(fleet: Fleet, ask: Asker):
    fleet.register(new_replica("a"))
    fleet.register(new_replica("b"))
    assert [ask() for _ in range(4)] == ["a", "b", "a", "b"]
    fleet.register(new_replica("b"))
    assert [ask() for _ in range(2)] == ["b", "b"]


def test_a_request_on_its_way_counts_once_and_until_it_arrives_or_is_given_up(
    fleet: Fleet, ask: Asker, clock: ManualClock
):
    for name in ("a", "b"):
        fleet.register(new_replica(name))
        _report(fleet, name)
    assert [ask(), ask()] == ["a", "b"]
    _report(fleet, "a", running=1, new_request_ids=("r1",))  # arrived: counted as running, not twice
    assert [ask(), ask()] == ["a", "b"]
    _report(fleet, "a")
    clock.advance(PENDING_SECONDS)  # r2, r3 and r4 never arrived
    assert [ask(), ask()] == ["a", "b"]


def test_fresh_loads_win_over_registrations(fleet: Fleet, ask: Asker):
    for name in ("a", "b"):
        fleet.register(new_replica(name))
    _report(fleet, "a", running=5)
    assert ask() == "b"
    fleet.register(new_replica("a"))  # a renewal is older news than the stream's
    assert ask() == "b"


def test_the_faster_verifier_gets_more_requests(fleet: Fleet, ask: Asker):
    """Until its rounds take as long as the slow one's would: water filling in round time."""
    for name, seconds in (("fast", 0.021), ("slow", 0.050)):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=SLOPE)
        _rounds(fleet, name, 60, seconds)
    chosen = [ask() for _ in range(36)]  # a round of the fast one with 30 takes 50 ms
    assert chosen.count("fast") > 2 * chosen.count("slow")
    assert "slow" in chosen


def test_a_verifier_that_is_throttled_gets_fewer_requests_within_two_seconds(fleet: Fleet, ask: Asker):
    for name in ("a", "b"):
        fleet.register(new_replica(name))
        _report(fleet, name, running=4, profile=SLOPE)
        _rounds(fleet, name, 50, 0.021)
    _rounds(fleet, "a", 30, 0.063, start=51)  # three times slower for 1.9 s
    assert [ask() for _ in range(8)].count("b") >= 7


def test_a_slowdown_is_forgotten_while_nothing_can_show_that_it_is_over(
    fleet: Fleet, ask: Asker, clock: ManualClock
):
    for name in ("a", "b"):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=SLOPE)
    _rounds(fleet, "a", 60, 0.200)  # stalled by something
    _rounds(fleet, "b", 60, 0.021)
    _report(fleet, "b", running=4)
    assert ask() == "b"
    for _ in range(4):
        clock.advance(5.0)
        fleet.register(new_replica("a"))
        fleet.register(new_replica("b"))
    _report(fleet, "a")
    _report(fleet, "b", running=4)
    _rounds(fleet, "b", 1, 0.021, start=61)
    assert ask() == "a"


def test_a_verifier_whose_rounds_do_not_end_gets_no_requests_whatever_else_it_says(
    fleet: Fleet, ask: Asker, clock: ManualClock
):
    for name in ("a", "b"):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=SLOPE)
        _rounds(fleet, name, 1, 0.021)
    clock.advance(8.0)
    _report(fleet, "a", running=1)
    _report(fleet, "b", running=4)
    _rounds(fleet, "b", 1, 0.021, start=2)
    assert ask() == "a"  # having had nothing to do is no hanging
    for number in range(3, 6):
        clock.advance(0.5)
        _report(fleet, "a", running=1)  # its event loop lives, its device does not
        _report(fleet, "b", running=4)
        _rounds(fleet, "b", 1, 0.021, start=number)
    assert {ask() for _ in range(8)} == {"b"}
    assert ask(exclude=("b",)) == "a"  # it may yet come back
    _rounds(fleet, "a", 1, 0.021, start=2)
    assert ask() == "a"


def test_a_long_chunk_of_a_prompt_is_no_hanging(fleet: Fleet, ask: Asker, clock: ManualClock):
    """On a slow machine it takes seconds, as the step times say."""
    slow = tuple(replace(point, seconds=20 * point.seconds) for point in SLOPE)  # 4 s for 256 tokens
    for name, running in (("a", 1), ("b", 20)):
        fleet.register(new_replica(name))
        _report(fleet, name, running=running, profile=slow)
    clock.advance(6.0)
    _report(fleet, "a", running=1)
    _report(fleet, "b", running=20)
    _rounds(fleet, "b", 1, 0.420)
    assert ask() == "a"


def test_a_batch_that_is_full_makes_requests_wait(fleet: Fleet, ask: Asker):
    for name, running in (("full", 4), ("fuller", 6)):
        fleet.register(new_replica(name))
        _report(fleet, name, running=running, max_running_requests=4 if name == "full" else 64, profile=SLOPE)
    assert ask() == "fuller"


def _flat(scale: float) -> tuple[StepTime, ...]:
    """Of a machine whose rounds hardly become longer with more requests."""
    times = ((1, 1, 0.0100), (16, 16, 0.0101), (64, 64, 0.0110), (1, 256, 0.0120))
    return tuple(
        StepTime(requests=requests, batch_tokens=tokens, context_tokens=0, seconds=scale * seconds)
        for requests, tokens, seconds in times
    )


def test_verifiers_that_are_about_as_fast_get_as_many_requests(fleet: Fleet, ask: Asker):
    for name, scale in (("a", 1.0), ("b", 0.97), ("c", 1.03), ("slow", 1.3)):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=_flat(scale))
    chosen = [ask() for _ in range(24)]
    assert {name: chosen.count(name) for name in "abc"} == {"a": 8, "b": 8, "c": 8}


def test_a_verifier_that_drafts_is_no_slower_one(fleet: Fleet, ask: Asker):
    """Its rounds are longer, and bring more tokens than that costs."""
    for name, verified in (("drafts", 5), ("plain", 0)):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=SLOPE)
        for number in range(1, 60):
            request = RequestSurvival(
                sequence_id="s", survival=(0.9,) * verified, verify_length=verified, accepted=verified
            )
            fleet.observe(
                RoundReport(
                    replica_id=name,
                    round=number,
                    requests=(request,),
                    batch_tokens=1 + verified,
                    step_seconds=0.020 + 0.001 * (1 + verified),
                )
            )
    chosen = [ask() for _ in range(10)]
    assert abs(chosen.count("drafts") - chosen.count("plain")) <= 1


@pytest.mark.parametrize(("blocks", "most_ahead"), [(4, 1), (16, 4)])
def test_a_known_prefix_outweighs_a_request_for_each_pass_it_saves(
    fleet: Fleet, ask: Asker, blocks: int, most_ahead: int
):
    """So that a system prompt that all requests share does not gather them, and a conversation stays."""
    prompt = tuple(range(blocks * BLOCK_TOKENS))
    for name in ("a", "b"):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=_flat(1.0))
    chosen = [ask(prompt=(*prompt, index)) for index in range(12)]
    assert chosen[: most_ahead + 1] == ["a"] * (most_ahead + 1)
    assert chosen[most_ahead + 1] == "b"
    assert chosen.count("a") - chosen.count("b") <= most_ahead + 1


PROMPT = tuple(range(20 * BLOCK_TOKENS))


def test_a_known_prefix_draws_a_request_until_load_outweighs_it(fleet: Fleet, ask: Asker):
    for name in ("a", "b"):
        fleet.register(new_replica(name))
        _report(fleet, name, profile=SLOPE)
    same = [ask(prompt=(*PROMPT, index)) for index in range(41)]
    assert same[:2] == ["a", "a"]  # without the prefix the idle verifier would have been chosen
    assert "b" in same  # and prefix affinity must not melt one verifier
    other = tuple(token + 1 for token in PROMPT)
    assert ask(prompt=other) == min(("a", "b"), key=same.count)


@given(st.lists(st.tuples(st.lists(st.integers(0, 20), max_size=5), st.sampled_from("abcdefg"))))
def test_the_prefix_table_is_bounded_and_remembers_the_last_verifier(history):
    table = PrefixTable(max_prefixes=8)
    for hashes, name in history:
        table.record(hashes, name)
        assert len(table) <= 8
        assert table.matched_tokens(hashes).get(name, 0) == len(hashes) * BLOCK_TOKENS


def test_the_prefix_table_remembers_the_latest_verifiers_of_a_prefix():
    table = PrefixTable()
    for name in "abcdef":
        table.record((1,), name)
    assert set(table.matched_tokens((1,))) == {*"abcdef"[-REPLICAS_PER_PREFIX:]}


def test_the_prefix_table_forgets_one_verifier_and_keeps_the_others():
    table = PrefixTable()
    table.record((1, 2), "a")
    table.record((1,), "b")
    table.forget("a")
    assert table.matched_tokens((1, 2)) == {"b": BLOCK_TOKENS}
    assert len(table) == 1
    table.forget("nobody")
    assert len(table) == 1


def test_drafters_draining_excluded_and_other_models_are_not_chosen(fleet: Fleet, ask: Asker):
    fleet.register(new_replica("drafter", role=Role.DRAFTER))
    fleet.register(new_replica("draining", draining=True))
    fleet.register(new_replica("other", model="other"))
    fleet.register(new_replica("failed"))
    fleet.register(new_replica("leaving"))
    _report(fleet, "leaving", draining=True)  # it says so before its next renewal
    fleet.register(new_replica("fit", running_requests=100))
    assert ask(exclude=("failed",)) == "fit"


def test_a_verifier_whose_stream_broke_is_the_last_resort(fleet: Fleet, ask: Asker):
    for name, running in (("a", 0), ("b", 50)):
        fleet.register(new_replica(name, running_requests=running))
    fleet.loads.disconnected("a")
    assert ask() == "b"
    assert ask(exclude=("b",)) == "a"
    fleet.register(new_replica("a"))
    assert ask() == "a"


def test_a_verifier_whose_stream_broke_is_back_with_its_first_report(fleet: Fleet, ask: Asker):
    for name, running in (("a", 0), ("b", 50)):
        fleet.register(new_replica(name, running_requests=running))
    fleet.loads.disconnected("a")
    _report(fleet, "a")
    assert ask() == "a"


def test_what_a_broken_stream_told_last_is_forgotten(fleet: Fleet, ask: Asker):
    for name, running in (("a", 9), ("b", 5)):
        fleet.register(new_replica(name))
        _report(fleet, name, running=running)
    fleet.loads.disconnected("a")
    fleet.register(new_replica("a", running_requests=1))
    assert ask() == "a"


def test_a_verifier_that_left_and_came_back_is_as_new(fleet: Fleet, ask: Asker):
    for name, running in (("a", 9), ("b", 5)):
        fleet.register(new_replica(name))
        _report(fleet, name, running=running)
    fleet.prefixes.record((1,), "a")
    fleet.deregister("a")
    fleet.register(new_replica("a"))
    assert ask() == "a"
    assert fleet.prefixes.matched_tokens((1,)) == {}


def test_why_nobody_serves_is_said(fleet: Fleet, ask: Asker):
    with pytest.raises(UnavailableError, match=r"no verifier serves model 'm' now \(models served: none\)"):
        ask()
    fleet.register(new_replica("a", model="other"))
    with pytest.raises(UnavailableError, match=r"models served: other\)"):
        ask()
    fleet.register(new_replica("b", draining=True))
    fleet.register(new_replica("c"))
    with pytest.raises(UnavailableError, match="of 2, 1 are draining and 1 are excluded"):
        ask(exclude=("c",))


loads = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6)


@given(loads, st.integers(1, 40))
def test_assigning_fills_the_least_loaded_first(initial: list[tuple[int, int]], requests: int):
    """After every assignment the chosen verifier was a least loaded one: water filling."""
    fleet = Fleet(10.0, ManualClock())
    ask = Asker(fleet)
    load = {}
    for index, (running, waiting) in enumerate(initial):
        replica = new_replica(f"v{index}", running_requests=running, waiting_requests=waiting)
        fleet.register(replica)
        load[replica.replica_id] = running + waiting
    for _ in range(requests):
        chosen = ask()
        assert load[chosen] == min(load.values())
        load[chosen] += 1


def test_a_request_that_began_on_some_weights_gets_no_others(fleet: Fleet):
    for name, weights in (("a", "new"), ("b", "old"), ("c", "old"), ("d", "")):
        fleet.register(new_replica(name, weights=weights))
    request = AssignRequest(request_id="r", model="m", weights="old", exclude_replica_ids=("b",))
    assert fleet.assign(request).replica_id == "c"
    fleet.deregister("c")
    with pytest.raises(UnavailableError, match="excluded by the request, 2 serve other weights"):
        fleet.assign(request)
    assert fleet.assign(replace(request, weights="")).replica_id == "a"


def test_a_verifier_whose_estimates_overflow_does_not_fail_the_others_requests(
    fleet: Fleet, ask: Asker, caplog: pytest.LogCaptureFixture
):
    absurd = tuple(
        StepTime(requests=1, batch_tokens=tokens, context_tokens=0, seconds=seconds)
        for tokens, seconds in ((1, 1e307), (2, 1.7e308))
    )
    for name, profile, cohorts in (("good", SLOPE, 1), ("broken", absurd, 2)):
        fleet.register(new_replica(name))
        requests = (RequestSurvival(sequence_id="s", survival=(), verify_length=0, accepted=0),) * 2
        fleet.observe(
            RoundReport(
                replica_id=name,
                round=1,
                requests=requests,
                profile=profile,
                cohorts=cohorts,
                load=VerifierLoad(running_requests=8),
            )
        )
    assert {ask() for _ in range(4)} == {"broken", "good"}  # by the other's speed
    assert all(fleet.floor_concurrency(one) is None for one in fleet.state.replicas(Role.VERIFIER))
    assert caplog.text.count("dropping the step times of verifier broken") == 1
