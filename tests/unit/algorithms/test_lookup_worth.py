"""Lookup in batches is used where rounds with it were faster, and retried from time to time where not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from dspark_core.algorithms.lookup_worth import (
    FIRST_ROUNDS,
    KEPT_ROUNDS,
    MAX_KEPT_ROUNDS,
    TRIED_ROUNDS,
    LookupWorth,
)

LOADS: dict[str, Callable[[int, random.Random], int]] = {
    "constant": lambda number, source: 20,
    "two sizes by the round, as cohorts": lambda number, source: (16, 31)[number % 2],
    "two sizes, short": lambda number, source: (16, 31)[number // 50 % 2],
    "two sizes, long": lambda number, source: (16, 31)[number // 400 % 2],
    "rising and falling": lambda number, source: 16 + abs(number // 100 % 30 - 15),
    "any": lambda number, source: source.randint(16, 31),
}


def simulated(
    worth: LookupWorth,
    count: int,
    gain: float,
    *,
    load: Callable[[int, random.Random], int] = LOADS["constant"],
    speed: Callable[[int], float] = lambda number: 1.0,
    noise: float = 0.15,
    seed: int = 0,
) -> list[bool]:
    """Which of `count` rounds looked up, if that gives `gain` more tokens per second, plus or minus `noise`.
    A step of 31 requests takes about 1.5 times as long as one of 16."""
    source, looked = random.Random(seed), []
    for number in range(count):
        requests = load(number, source)
        looked.append(worth.looks(requests))
        rate = (1.0 + gain * looked[-1]) * speed(number) * max(source.gauss(1.0, noise), 0.1)
        seconds = (5.0 + 0.3 * requests) / 1000
        worth.learn(requests, looked[-1], requests, seconds / rate)
    return looked


@pytest.mark.parametrize("gain", [-0.2, -0.1, 0.1, 0.2])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_few_rounds_go_the_worse_way_whatever_the_load_does(
    load: Callable[[int, random.Random], int], gain: float
) -> None:
    """The worse alternative is tried in a few of hundreds of rounds; the first rounds look up untested."""
    worse = [simulated(LookupWorth(), 8000, gain, load=load, seed=seed).count(gain < 0) for seed in range(6)]
    assert sum(worse) / len(worse) < 0.03 * 8000
    assert min(worse) >= 3 * TRIED_ROUNDS


@pytest.mark.parametrize("gain", [-0.1, 0.1])
def test_a_machine_whose_speed_comes_and_goes_is_no_reason_to_change(gain: float) -> None:
    """Speed varies by a factor of three within minutes, whichever alternative is used."""
    for seed in range(6):
        looked = simulated(
            LookupWorth(), 8000, gain, speed=lambda number: 1.5 + 0.75 * math.sin(number / 300), seed=seed
        )
        assert looked.count(gain < 0) < 0.06 * len(looked)


@pytest.mark.parametrize(("before", "after"), [(-0.25, 0.25), (0.25, -0.25), (-0.2, 0.1), (0.2, -0.1)])
def test_what_becomes_better_is_found_out_within_a_few_trials(before: float, after: float) -> None:
    """The machine is twice as fast from then on, so earlier measurements no longer apply."""
    for seed in range(6):
        worth = LookupWorth()
        simulated(worth, 8000, before, seed=seed)
        looked = simulated(worth, 4000, after, speed=lambda number: 2.0, seed=seed)
        assert looked[MAX_KEPT_ROUNDS + 4 * KEPT_ROUNDS :].count(after < 0) < 0.06 * 4000


def test_a_loss_from_the_start_is_noticed_soon() -> None:
    """A service that has just started, or a benchmark, should not waste a hundred rounds on lookup."""
    for seed in range(6):
        looked = simulated(LookupWorth(), 100, -0.2, noise=0.1, seed=seed)
        assert not any(looked[FIRST_ROUNDS + TRIED_ROUNDS :])


def test_one_trial_alone_changes_no_mind() -> None:
    """As if all other load had paused during the trial."""
    worth = LookupWorth()
    simulated(worth, 8000, -0.15)
    while not worth.looks(20):
        simulated(worth, 1, -0.15)
    simulated(worth, TRIED_ROUNDS, -0.15, speed=lambda number: 50.0)
    assert not any(simulated(worth, KEPT_ROUNDS, -0.15))


def rounds(worth: LookupWorth, count: int, requests: int, looking: float, plain: float) -> list[bool]:
    """Plays `count` rounds with the given speeds per request, with lookup and without."""
    source, looked = random.Random(1), []
    for _ in range(count):
        looked.append(worth.looks(requests))
        speed = (looking if looked[-1] else plain) * source.uniform(0.8, 1.2)
        worth.learn(requests, looked[-1], requests, 1.0 / speed)
    return looked


def test_rounds_that_were_decided_before_a_change_count_for_the_way_they_went() -> None:
    worth = LookupWorth()
    rounds(worth, FIRST_ROUNDS, 16, 1.0, 1.0)
    assert not worth.looks(16)  # plain rounds are tried
    for _ in range(TRIED_ROUNDS):
        worth.learn(16, True, 16, 1.0)
    assert not worth.looks(16)  # no plain round was seen yet


def test_sizes_are_apart_and_a_lone_request_always_looks() -> None:
    worth = LookupWorth()
    rounds(worth, 1000, 16, 0.5, 1.0)
    assert not worth.looks(17)
    assert worth.looks(4)
    assert all(rounds(worth, 1000, 1, 0.5, 1.0))
