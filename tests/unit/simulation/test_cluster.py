"""A simulated cluster does what arithmetic says it must."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dspark_core.algorithms.loop_time import LoopTimeModel
from dspark_core.errors import ConfigError
from dspark_core.simulation.cluster import Cluster
from dspark_core.simulation.domains import RecordedRequest, stack_domains
from dspark_core.simulation.planner_names import NAMES, planner_factory
from dspark_core.simulation.population import draw_population
from dspark_core.simulation.running import World, frontier, simulate, size_pools
from dspark_core.simulation.scenario import Scenario
from tests.unit.simulation.worlds import FLAT, PERFECT, STEP_SECONDS, recorded, round_time, world

EVERY_PLANNER = [name.replace(":N", ":3").replace(":P", ":0.4") for name in NAMES]
SMALL = Scenario(
    verifiers=2, users=8, requests=60, network_rtt_seconds=0.001, answer_tokens=20, prompt_tokens=10
)


def test_one_user_without_speculation_gets_one_token_a_step() -> None:
    alone = Scenario(verifiers=1, users=1, requests=5, fixed_lengths=True, prompt_tokens=10, answer_tokens=21)
    summary = simulate(world(times=FLAT), alone, "none")
    # One step of prefill with the first token, then one for each of the other twenty.
    assert summary.seconds == pytest.approx(5 * 21 * STEP_SECONDS)
    assert summary.user_speed == pytest.approx((1 / STEP_SECONDS,) * 3)
    assert summary.time_to_first_token[1] == pytest.approx(STEP_SECONDS)
    assert summary.rounds == 5 * 21


def test_drafts_that_always_stand_multiply_the_speed_and_cost_their_time() -> None:
    alone = Scenario(
        verifiers=1,
        users=1,
        requests=4,
        fixed_lengths=True,
        prompt_tokens=1,
        answer_tokens=51,
        network_rtt_seconds=0.003,
    )
    times = round_time(per_token=0.0, draft=0.002)
    summary = simulate(World(PERFECT, times), alone, "fixed:4")
    assert summary.accepted_length == 5.0
    assert summary.user_speed[1] == pytest.approx(5 / (STEP_SECONDS + 0.002 + 0.003))


SURE = {
    "only": (
        RecordedRequest(
            survival=((0.5, 0.25),) * 12,
            accepted=(0,) * 12,
            looked_up=((1.0, 1.0, 1.0),) * 12,
            looked_up_accepted=(3, 2, 1, 0) * 3,
            by_token=True,
        ),
    )
}
"""Of every four tokens the first, once there, tells the other three; what the drafter says never stands."""


@pytest.mark.parametrize("planner", ["dspark", "cluster"])
def test_looked_up_tokens_are_verified_for_nothing_where_rounds_really_end(planner: str) -> None:
    alone = Scenario(
        verifiers=1,
        users=1,
        requests=4,
        fixed_lengths=True,
        prompt_tokens=1,
        answer_tokens=801,
        max_answer_tokens=801,
        coupled=True,
    )
    dear = World(stack_domains(SURE), round_time(per_token=0.0, draft=0.2))
    found = simulate(dear, alone, planner)
    # But for a few rounds that try the drafter, each holds the next three tokens and the one behind them.
    assert found.accepted_length == pytest.approx(4.0, abs=0.15)
    assert found.drafter_utilisation < 0.25
    without = simulate(dear, dataclasses.replace(alone, no_lookup=True), planner)
    assert without.accepted_length == 1.0
    assert simulate(dear, alone, "fixed:3").accepted_length == 1.0  # the drafter's, and nothing else


def test_who_is_followed_by_token_meets_what_lies_where_the_round_ended() -> None:
    stairs = RecordedRequest(
        survival=((0.5, 0.5),) * 6, accepted=(2, 1, 0, 2, 1, 0), looked_up=(), by_token=True
    )
    alone = Scenario(verifiers=1, users=1, requests=3, fixed_lengths=True, answer_tokens=301, seed=3)
    by_token, by_round = (
        simulate(World(stack_domains({"x": (one,)}), round_time()), alone, "fixed:2")
        for one in (stairs, dataclasses.replace(stairs, by_token=False))
    )
    assert by_token.accepted_length == pytest.approx(3.0, abs=0.05)
    assert by_round.accepted_length == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_price_on_shared_drafters_keeps_them_useful(coupled: bool) -> None:
    shared = Scenario(verifiers=8, drafters=1, users=32, requests=240, answer_tokens=60, coupled=coupled)
    overloaded = world(0.7, round_time(per_token=0.0, draft=0.005))
    plain, unpriced, priced = (
        simulate(overloaded, shared, planner) for planner in ("none", "cluster:unpriced", "cluster")
    )
    assert priced.steady_tokens_per_second > 1.03 * unpriced.steady_tokens_per_second
    assert priced.steady_tokens_per_second > 1.02 * plain.steady_tokens_per_second
    assert priced.draft_queue_seconds < unpriced.draft_queue_seconds


def test_a_price_changes_nothing_while_there_are_drafters_enough() -> None:
    for drafters in (0, 8):
        ample = Scenario(verifiers=8, drafters=drafters, users=32, requests=120, answer_tokens=40)
        cluster, unpriced = (
            dataclasses.replace(simulate(world(), ample, planner), planner="")
            for planner in ("cluster", "cluster:unpriced")
        )
        assert cluster == unpriced


def test_answers_of_one_token_have_no_speed_but_are_answered() -> None:
    short = Scenario(verifiers=1, users=1, requests=1, fixed_lengths=True, answer_tokens=1)
    summary = simulate(world(times=FLAT), short, "cluster")
    assert (summary.tokens, summary.rounds, summary.user_speed) == (1, 1, (0.0, 0.0, 0.0))
    assert summary.steady_tokens_per_second == pytest.approx(1 / STEP_SECONDS)


def test_a_prompt_longer_than_a_chunk_takes_more_steps() -> None:
    long = Scenario(verifiers=1, users=1, requests=1, fixed_lengths=True, prompt_tokens=100, answer_tokens=2)
    chunked = dataclasses.replace(long, prefill_chunk_tokens=30)
    assert simulate(world(times=FLAT), long, "none").rounds == 2
    assert simulate(world(times=FLAT), chunked, "none").rounds == 5


def test_a_short_prompt_does_not_wait_for_long_ones_before_it() -> None:
    three = Scenario(verifiers=1, users=3, requests=3, answer_tokens=5, prefill_chunk_tokens=20)
    people = draw_population(three, world().recorded)
    people = dataclasses.replace(people, prompt_tokens=np.array([100, 100, 10]))
    none = planner_factory("none")
    told = Cluster(three, world().recorded, people, FLAT, none).run().first_token
    assert told[2] == pytest.approx(STEP_SECONDS)
    assert told[2] < told[0] < told[1]


def test_the_round_loop_takes_its_time_in_every_round() -> None:
    alone = Scenario(verifiers=1, users=1, requests=1, fixed_lengths=True, answer_tokens=11)
    slow = dataclasses.replace(FLAT, loop=LoopTimeModel(0.002, 0.001))
    bare, looped = (simulate(world(times=times), alone, "none") for times in (FLAT, slow))
    assert looped.seconds == pytest.approx(bare.seconds + 11 * 0.003)


def test_prompts_beside_running_requests_are_paced_as_when_serving() -> None:
    """30 ms allow few of the 200 tokens at 1 ms each, so a prompt takes more rounds, which are shorter."""
    free = Scenario(
        verifiers=1, users=4, requests=40, fixed_lengths=False, prompt_tokens=200, answer_tokens=30
    )
    paced = dataclasses.replace(free, max_step_seconds=0.030)
    at_once, slowly = (simulate(world(), scenario, "none") for scenario in (free, paced))
    assert slowly.rounds > at_once.rounds
    assert slowly.time_to_first_token[1] > at_once.time_to_first_token[1]
    assert slowly.tokens == at_once.tokens


@pytest.mark.parametrize("planner", EVERY_PLANNER)
def test_every_planner_answers_every_request_in_full(planner: str) -> None:
    summary = simulate(world(), SMALL, planner)
    population = draw_population(SMALL, world().recorded)
    assert summary.tokens == population.answer_tokens.sum()
    assert summary.verify_length <= 4
    assert 0 < summary.verifier_utilisation <= 1.0 + 1e-9
    assert all(np.isfinite(summary.user_speed))


@pytest.mark.parametrize("planner", ["cluster", "dspark"])
def test_the_same_seed_gives_the_same_figures_and_another_one_others(planner: str) -> None:
    first, again = (simulate(world(), SMALL, planner) for _ in range(2))
    assert first == again
    assert simulate(world(), dataclasses.replace(SMALL, seed=1), planner) != first


def test_planners_meet_the_same_requests() -> None:
    people = draw_population(SMALL, world().recorded)
    slower = draw_population(
        dataclasses.replace(SMALL, floor_share=0.5, floor_tokens_per_second=9), world().recorded
    )
    assert (people.answer_tokens == slower.answer_tokens).all()
    assert (people.phase == slower.phase).all()


def test_a_shared_drafter_makes_its_verifiers_wait() -> None:
    times = round_time(draft=0.02)
    own = simulate(world(times=times), SMALL, "fixed:2")
    shared = simulate(world(times=times), dataclasses.replace(SMALL, drafters=1), "fixed:2")
    assert own.draft_queue_seconds == pytest.approx(0.0)
    assert shared.draft_queue_seconds > 0.001
    assert shared.tokens_per_second < own.tokens_per_second


def test_a_slow_verifier_is_given_fewer_requests() -> None:
    half = dataclasses.replace(SMALL, slow_verifiers=0.5, requests=200)
    assert (
        simulate(world(), half, "none").tokens_per_second
        > 0.6 * simulate(world(), dataclasses.replace(half, slow_verifiers=0.0), "none").tokens_per_second
    )


def test_confident_drafts_are_verified_further_and_no_worse_than_none() -> None:
    sure, unsure = (simulate(world(confidence), SMALL, "algorithm1") for confidence in (0.9, 0.3))
    assert sure.verify_length > unsure.verify_length
    assert sure.tokens_per_second > simulate(world(0.9), SMALL, "none").tokens_per_second


def test_verify_lengths_fall_with_load_where_tokens_cost_time() -> None:
    times = round_time(per_token=0.003)
    found = frontier(world(times=times), SMALL, ["cluster"], (1, 4, 16))["cluster"]
    lengths = [point.summary.verify_length for point in found]
    assert lengths == sorted(lengths, reverse=True)
    assert found[0].user_speed > found[-1].user_speed
    assert found[0].summary.tokens_per_second < found[-1].summary.tokens_per_second


def test_floors_are_counted_and_the_cluster_keeps_more_of_them() -> None:
    times = round_time(per_token=0.002, draft=0.001)
    promised = dataclasses.replace(
        SMALL, verifiers=1, users=6, requests=80, floor_share=0.3, floor_tokens_per_second=45.0
    )
    none, cluster = (simulate(world(0.85, times), promised, name) for name in ("none", "cluster"))
    assert none.promised == cluster.promised > 10
    assert cluster.floors_broken < none.floors_broken


def test_open_arrivals_wait_when_they_outrun_the_verifiers() -> None:
    slow = Scenario(verifiers=1, arrivals_per_second=1.0, requests=40, answer_tokens=20, max_running=4)
    flood = dataclasses.replace(slow, arrivals_per_second=100.0)
    assert simulate(world(), slow, "none").time_to_first_token[2] < 0.4
    assert simulate(world(), flood, "none").time_to_first_token[2] > 1.0


def test_pools_are_as_large_as_the_load_and_no_larger() -> None:
    load = Scenario(arrivals_per_second=20.0, requests=200, answer_tokens=40, max_running=8)
    pools = size_pools(world(), load, "algorithm1")
    assert 1 < pools.verifiers < 20
    assert 1 <= pools.drafters <= pools.verifiers
    assert pools.summary.time_to_first_token[2] <= 2.0
    fewer = dataclasses.replace(load, verifiers=pools.verifiers - 1, requests=2000)
    assert simulate(world(), fewer, "algorithm1").time_to_first_token[2] > 2.0
    with pytest.raises(ConfigError, match="arrivals_per_second"):
        size_pools(world(), dataclasses.replace(load, arrivals_per_second=0.0, users=4), "none")


@pytest.mark.parametrize(("arrivals", "verifiers"), [(18.0, 2), (20.2, 3), (21.0, 3)])
def test_pools_are_large_enough_for_arrivals_without_end(arrivals: float, verifiers: int) -> None:
    """A full verifier makes 8 tokens in 20 ms, ten answers a second. Where two get a little more than
    twenty it takes minutes until somebody waits for two seconds."""
    load = Scenario(
        arrivals_per_second=arrivals, requests=200, fixed_lengths=True, answer_tokens=40, max_running=8
    )
    assert size_pools(world(times=FLAT), load, "none").verifiers == verifiers


def test_mtp1_has_a_chance_and_a_cost_of_its_own() -> None:
    own = dataclasses.replace(SMALL, mtp1_accept=0.95, mtp1_draft_share=0.25)
    assert (
        simulate(world(0.5), own, "mtp1").accepted_length
        > simulate(world(0.5), SMALL, "mtp1").accepted_length
    )
    assert simulate(world(0.5), own, "mtp1").accepted_length <= 2.0


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"verifiers": 0, "users": 1}, "verifiers must be >= 1, got 0"),
        ({"users": 1, "arrivals_per_second": 2.0}, "exactly one of users and arrivals_per_second"),
        ({}, "exactly one of users and arrivals_per_second"),
        ({"users": 1, "floor_share": 0.5}, "floor_share and floor_tokens_per_second go together"),
        ({"users": 1.5}, "users must be a whole number, got 1.5"),
        ({"users": 1, "speed": 3}, "unknown scenario field 'speed'"),
        ({"users": 1, "domains": {"chat": "most"}}, "domains must map names to shares"),
        ({"users": 1, "answer_tokens": float("nan")}, "answer_tokens must be >= 1"),
        ({"users": 1, "coupled": 1}, "coupled must be true or false"),
    ],
)
def test_a_wrong_scenario_names_field_and_value(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Scenario.of(values)


def test_a_domain_that_was_not_recorded_is_named() -> None:
    with pytest.raises(ConfigError, match="domain 'poems' is not recorded; there are: only"):
        simulate(world(), dataclasses.replace(SMALL, domains={"poems": 1.0}), "none")


@pytest.mark.parametrize("name", ["fast", "fixed", "fixed:-1", "fixed:0", "threshold:2", "threshold:x"])
def test_unknown_planners_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name.partition(":")[0]):
        planner_factory(name)


def test_domains_are_mixed_by_their_shares() -> None:
    both = stack_domains({"easy": recorded(0.95), "hard": recorded(0.05)})
    mixed = dataclasses.replace(SMALL, requests=400, domains={"easy": 3.0, "hard": 1.0})
    people = draw_population(mixed, both)
    assert (people.domain == 0).mean() == pytest.approx(0.75, abs=0.07)
