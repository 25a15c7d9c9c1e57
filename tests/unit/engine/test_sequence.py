"""What one sequence learns by itself: how long its drafts should be, and what it found cached."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dspark_core.engine.caches.block_manager import BlockManager
from dspark_core.engine.sequence import SequenceState
from dspark_core.output_rules import LogitAdjustments
from tests.unit.engine.tiny import request

BLOCK = 7


def sequence(name: str = "a", prompt: tuple[int, ...] = (1, 2)) -> SequenceState:
    return SequenceState(request(name, prompt), 0, 0, 99)


@pytest.mark.parametrize(
    ("before", "verified", "after"),
    [
        (None, 2, 6),  # one less than the block
        (4, 1, 3),
        (4, 3, 4),
        (3, 3, 5),  # all of what was wished for
        (3, 5, 7),
        (9, 7, 9),  # no block is longer
        (9, 0, 6),
        (1, 0, 1),
    ],
)
def test_useful_drafts_shrink_slowly_and_grow_while_all_is_verified(
    before: int | None, verified: int, after: int
) -> None:
    one = sequence()
    one.useful_draft = before
    one.learn_useful_draft(BLOCK, verified)
    assert one.useful_draft == after


def test_what_a_sequence_computed_itself_was_not_cached_for_it() -> None:
    manager, prompt = BlockManager(9, 2), (1, 2, 3, 4, 5, 6, 7)
    first, second = sequence("a", prompt), sequence("b", (*prompt[:5], 9, 9))
    assert first.take_pages(manager)
    first.computed = 4
    first.publish_full_pages(manager)
    assert second.take_pages(manager)
    assert (first.cached_prompt_tokens, second.cached_prompt_tokens) == (0, 4)
    for one in (first, second):  # both are preempted and come back
        one.release(manager)
        assert one.take_pages(manager)
        assert one.computed == 4
    assert (first.cached_prompt_tokens, second.cached_prompt_tokens) == (0, 4)


@pytest.mark.parametrize("more", [{"top_logprobs": 0}, {"adjustments": LogitAdjustments(min_tokens=1)}])
def test_whose_logits_are_reported_or_adjusted_is_shaped(more: dict[str, object]) -> None:
    plain = request("a", [1])
    assert not SequenceState(plain, 0, 0, 9).shaped
    assert SequenceState(replace(plain, **more), 0, 0, 9).shaped
