"""Looking drafts up in batches is kept where rounds with it gave more, and tried again where they did not."""

from __future__ import annotations

import random

import pytest

from dspark_core.algorithms.lookup_worth import KEPT_ROUNDS, TRIED_ROUNDS, LookupWorth


def rounds(worth: LookupWorth, count: int, requests: int, looking: float, plain: float) -> list[bool]:
    """So many rounds, which give so many tokens a second to each request in either way."""
    source, looked = random.Random(1), []
    for _ in range(count):
        looked.append(worth.looks(requests))
        speed = (looking if looked[-1] else plain) * source.uniform(0.8, 1.2)
        worth.learn(requests, looked[-1], requests, 1.0 / speed)
    return looked


@pytest.mark.parametrize(("looking", "plain", "better"), [(1.15, 1.0, True), (0.85, 1.0, False)])
def test_the_better_way_is_kept_but_for_a_few_rounds(looking: float, plain: float, better: bool) -> None:
    worth = LookupWorth()
    rounds(worth, 2 * (KEPT_ROUNDS + TRIED_ROUNDS), 16, looking, plain)
    looked = rounds(worth, 2000, 16, looking, plain)
    assert looked.count(better) >= 0.97 * len(looked)
    assert (not better) in looked  # and the other is tried


def test_what_changes_is_found_out() -> None:
    worth = LookupWorth()
    rounds(worth, 3000, 16, 0.8, 1.0)
    looked = rounds(worth, 3000, 16, 1.3, 1.0)
    assert all(looked[-64:])


def test_rounds_that_were_decided_before_a_change_count_for_the_way_they_went() -> None:
    worth = LookupWorth()
    rounds(worth, KEPT_ROUNDS, 16, 1.0, 1.0)
    assert not worth.looks(16)  # plain rounds are tried
    for _ in range(TRIED_ROUNDS):
        worth.learn(16, True, 16, 1.0)
    assert not worth.looks(16)  # none was seen yet


def test_sizes_are_apart_and_a_lone_request_always_looks() -> None:
    worth = LookupWorth()
    rounds(worth, 1000, 16, 0.5, 1.0)
    assert not worth.looks(17)
    assert worth.looks(4)
    assert all(rounds(worth, 1000, 1, 0.5, 1.0))
