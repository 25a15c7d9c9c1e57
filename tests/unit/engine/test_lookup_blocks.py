"""Looked-up blocks without an engine: when they are proposed, how long they are, and whose outcomes count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from dspark_core.engine.drafts.lookup import (
    BLOCK_TOKENS,
    FORCED_CONFIDENCE,
    LOOK_ROUNDS,
    MAX_GROUPS,
    UNUSED_ROUNDS,
    LookupDrafting,
)
from dspark_core.engine.protocols import DraftBlock
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.verdicts.acceptance import Proposal, Verdict
from dspark_core.records import SamplingParams, SpeculationOptions, Verification
from tests.unit.engine.tiny import request

TEXT = [1, 2, 3, 4, 5] * 6


def sequence(name: str = "a", max_draft_tokens: int | None = None, **sampling: Any) -> SequenceState:
    options = SpeculationOptions(verification=Verification.REJECTION, max_draft_tokens=max_draft_tokens)
    asked = request(name, TEXT, None, sampling=SamplingParams(**sampling), speculation=options)
    return SequenceState(asked, 0, 0, 999)


def played(
    lookup: LookupDrafting, one: SequenceState, rounds: int, verified: int, accepted: int = 0
) -> list[DraftBlock | None]:
    blocks = []
    for _ in range(rounds):
        block = lookup.propose([one]).get(one.sequence_id)
        proposal = Proposal(one) if block is None else Proposal(one, block, verified)
        lookup.learn([proposal], [Verdict(accepted if block else 0, 1)])
        blocks.append(block)
    return blocks


def test_after_rounds_in_vain_one_in_a_few_looks_until_one_is_of_use() -> None:
    lookup, one = LookupDrafting(), sequence()
    rounds = 6 * LOOK_ROUNDS
    looked = [number for number, block in enumerate(played(lookup, one, rounds, 0), start=1) if block]
    rare = range(LOOK_ROUNDS * (UNUSED_ROUNDS // LOOK_ROUNDS + 1), rounds + 1, LOOK_ROUNDS)
    assert looked == [*range(1, UNUSED_ROUNDS + 1), *rare]
    assert [block is not None for block in played(lookup, one, LOOK_ROUNDS, 1)][-1]
    assert all(played(lookup, one, UNUSED_ROUNDS, 0))


class Grammar:
    """Forces some tokens, else allows the first few."""

    def __init__(self, forced: Iterable[int] = (), valid: int = 0) -> None:
        self._forced, self._valid = tuple(forced), valid

    def forced(self) -> tuple[int, ...]:
        return self._forced

    def valid(self, token_ids: tuple[int, ...]) -> int:
        return self._valid


@pytest.mark.parametrize("most", [None, 3])
def test_what_a_grammar_forces_is_the_block_as_far_as_one_may_be_verified(most: int | None) -> None:
    one = sequence(max_draft_tokens=most)
    one.grammar = Grammar(range(40, 60))  # type: ignore[assignment]
    (block,) = LookupDrafting().propose([one]).values()
    assert block.token_ids == tuple(range(40, 40 + (most or BLOCK_TOKENS)))
    assert block.confidences == pytest.approx([FORCED_CONFIDENCE] * len(block.token_ids))
    assert block.distribution is not None
    assert len(block.distribution.token_ids) == len(block.token_ids)


def test_of_looked_up_tokens_a_grammar_leaves_those_it_allows() -> None:
    one = sequence()
    one.grammar = Grammar(valid=2)  # type: ignore[assignment]
    (block,) = LookupDrafting().propose([one]).values()
    assert block.token_ids == (1, 2)
    assert len(block.confidences) == 2
    one.grammar = Grammar(valid=0)  # type: ignore[assignment]
    assert not LookupDrafting().propose([one])


def first_confidence(lookup: LookupDrafting, one: SequenceState) -> float:
    return lookup.propose([one])[one.sequence_id].confidences[0]


def test_requests_sampled_alike_share_what_was_learned() -> None:
    lookup = LookupDrafting()
    before = first_confidence(lookup, sequence("new", temperature=0.5))
    played(lookup, sequence("a", temperature=0.5), 30, 1)
    assert first_confidence(lookup, sequence("b", temperature=0.5)) < before - 0.1
    assert first_confidence(lookup, sequence("c", temperature=1.5)) == before


def test_of_too_many_kinds_of_sampling_the_oldest_is_forgotten() -> None:
    lookup = LookupDrafting()
    before = first_confidence(lookup, sequence("new", temperature=0.1))
    kinds = [
        {"temperature": temperature / 10, "top_p": top_p / 10}
        for top_p in range(4, 11)
        for temperature in range(1, 11)
    ][: MAX_GROUPS + 1]
    for number, kind in enumerate(kinds):
        played(lookup, sequence(f"old{number}", **kind), 12, 1)
    assert first_confidence(lookup, sequence("last", **kinds[-1])) < before - 0.1
    assert first_confidence(lookup, sequence("first", **kinds[0])) == before
