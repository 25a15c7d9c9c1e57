"""Simulated requests are routed by the scheduler's rule."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.cluster.replicas.routing import Candidate, choose
from dspark_core.simulation.router import Router
from tests.support.replicas import new_replica

STEEP = StepTimeModel.of_curve((1, 512), (0.01, 0.522))
FLAT = StepTimeModel.of_curve((1, 512), (0.01, 0.011))


def test_equal_verifiers_get_as_many_requests_and_a_slow_one_fewer() -> None:
    router = Router(RoundTimeModel(STEEP), (1.0, 1.0, 2.0), max_running=64)
    chosen = Counter(router.choose(32) for _ in range(50))
    assert abs(chosen[0] - chosen[1]) <= 1
    slow, fast = (STEEP.seconds(chosen[index], chosen[index]) for index in (2, 0))
    assert 2.0 * slow == pytest.approx(fast, rel=0.15)


def test_a_verifier_whose_requests_ended_is_next() -> None:
    router = Router(RoundTimeModel(STEEP), (1.0, 1.0), max_running=64)
    for _ in range(10):
        router.choose(32)
    router.ended(1)
    router.ended(1)
    assert [router.choose(32), router.choose(32)] == [1, 1]


@given(
    st.sampled_from([STEEP, FLAT]),
    st.lists(st.sampled_from([0.5, 1.0, 1.05, 1.6]), min_size=1, max_size=4),
    st.lists(st.integers(1, 600), min_size=1, max_size=20),
)
def test_the_choice_is_that_of_the_scheduler(
    verify: StepTimeModel, slowdowns: list[float], prompts: list[int]
) -> None:
    """Of verifiers without cached prefixes, whose rounds verify no drafts."""
    router = Router(RoundTimeModel(verify), slowdowns, max_running=8)
    paces = [VerifierPace() for _ in slowdowns]
    for pace, slowdown in zip(paces, slowdowns, strict=True):
        pace.start_from(replace(verify, scale=slowdown))
    requests = [0] * len(slowdowns)
    for tokens in prompts:
        candidates = [
            Candidate(
                replica=new_replica(f"{index:02}"),
                requests=running,
                max_running=8,
                pace=pace,
            )
            for index, (running, pace) in enumerate(zip(requests, paces, strict=True))
        ]
        expected = choose(candidates, tokens).replica.replica_id
        chosen = router.choose(tokens)
        assert f"{chosen:02}" == expected
        requests[chosen] += 1
