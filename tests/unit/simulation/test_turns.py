"""Simulated cohorts take turns as the engine's do, and as the formula says that verifiers plan by."""

from __future__ import annotations

import dataclasses

import pytest

from dspark_core.errors import ConfigError
from dspark_core.simulation.running import World, simulate
from dspark_core.simulation.scenario import Scenario
from tests.unit.simulation.worlds import PERFECT, STEP_SECONDS, round_time, world

PAIR = Scenario(
    verifiers=1,
    users=2,
    requests=8,
    fixed_lengths=True,
    prompt_tokens=1,
    answer_tokens=1001,
    max_answer_tokens=1001,
    coupled=True,
)
TURNS = dataclasses.replace(PAIR, cohorts=2)


@pytest.mark.parametrize(
    ("draft", "network"),
    [(0.004, 0.002), (0.004, 0.016), (0.004, 0.050), (0.030, 0.0), (0.030, 0.001), (0.050, 0.100)],
)
def test_a_pass_hides_as_much_of_the_others_drafts_as_the_formula_says(draft: float, network: float) -> None:
    times = round_time(per_token=0.0, draft=draft)
    scenario = dataclasses.replace(TURNS, network_rtt_seconds=network)
    summary = simulate(World(PERFECT, times), scenario, "fixed:4")
    beside = dataclasses.replace(times, network_seconds=network, beside_seconds=STEP_SECONDS)
    cycle = 2 * beside.seconds(1, 5, drafted=1)
    assert summary.accepted_length == 5.0
    assert summary.user_speed[1] == pytest.approx(5 / cycle, rel=0.02)
    exposed = 1 - STEP_SECONDS / (cycle / 2)
    assert summary.draft_wait_share == pytest.approx(exposed, abs=0.02)


def test_turns_pay_behind_a_slow_network_and_cost_where_there_is_nothing_to_hide() -> None:
    """Eight users: 45 ms for a pass of all forty tokens, 25 ms for one of half of them."""

    def speed(network: float, draft: float, cohorts: int) -> float:
        scenario = dataclasses.replace(
            TURNS, users=8, requests=24, network_rtt_seconds=network, cohorts=cohorts
        )
        times = round_time(base=0.005, per_token=0.001, draft=draft)
        return simulate(World(PERFECT, times), scenario, "dspark").tokens_per_second

    # (45 + 20) ms against two passes of 25 ms, and 45.5 ms against the same.
    assert speed(0.016, 0.004, 2) / speed(0.016, 0.004, 1) == pytest.approx(65 / 50, rel=0.05)
    assert speed(0.0, 0.0005, 2) / speed(0.0, 0.0005, 1) == pytest.approx(45.5 / 50, rel=0.05)


@pytest.mark.parametrize(
    "planner",
    ["none", "mtp1", "fixed:3", "threshold:0.4", "algorithm1", "delayed", "coupled", "dspark"],
)
@pytest.mark.parametrize("load", [{"users": 13}, {"users": 1}, {"users": 0, "arrivals_per_second": 6.0}])
def test_everybody_is_answered_in_full(planner: str, load: dict[str, float]) -> None:
    scenario = Scenario(
        verifiers=2,
        cohorts=2,
        requests=90,
        answer_tokens=12,
        prompt_tokens=300,
        network_rtt_seconds=0.03,
        floor_share=0.3,
        floor_tokens_per_second=5.0,
        coupled=planner == "coupled",
        **load,
    )
    summary = simulate(world(), scenario, planner)
    assert summary.requests == 90
    assert summary.tokens_per_second > 0
    again = simulate(world(), scenario, planner)
    assert again == summary


def test_a_lone_request_takes_no_turns() -> None:
    alone = dataclasses.replace(PAIR, users=1, requests=3, network_rtt_seconds=0.01)
    for planner in ("fixed:4", "dspark"):
        plain, turns = (
            simulate(World(PERFECT, round_time()), dataclasses.replace(alone, cohorts=cohorts), planner)
            for cohorts in (1, 2)
        )
        assert turns == plain


def test_cohorts_stay_of_one_size() -> None:
    """By how many decode together: with sixteen users hardly ever other than eight."""
    crowd = dataclasses.replace(TURNS, users=16, requests=64, answer_tokens=60, fixed_lengths=False)
    loads = dict(simulate(world(), crowd, "fixed:2").verify_length_by_load)
    assert max(loads) <= 10


@pytest.mark.parametrize("planner", ["cluster", "cluster:unpriced"])
def test_planners_that_know_no_turns_are_refused(planner: str) -> None:
    with pytest.raises(ConfigError, match=f"planner '{planner}' knows no turns"):
        simulate(world(), TURNS, planner)


@pytest.mark.parametrize("cohorts", [0, 3])
def test_there_are_one_or_two_cohorts(cohorts: int) -> None:
    with pytest.raises(ConfigError, match=f"cohorts must be 1 or 2, got {cohorts}"):
        dataclasses.replace(PAIR, cohorts=cohorts)
