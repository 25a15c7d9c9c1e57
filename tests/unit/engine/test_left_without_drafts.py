"""The planner is not asked every round about requests it left without drafts or with looked-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.engine.drafts.draft_turns import LEFT_ROUNDS, DraftTurns
from dspark_core.engine.drafts.drafting import NO_DRAFTS
from dspark_core.engine.protocols import DraftBlock
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import DraftOrigin
from tests.unit.engine.tiny import request


class Asked(FullPlanSource):
    """Prefers looked-up tokens if they promise enough, and counts how often it is asked."""

    def __init__(self) -> None:
        self.questions = 0
        self.least = 1.0
        """Expected looked-up tokens below which it wants a draft."""

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        self.questions += 1
        return tuple(sum(candidate.lookup_survival) < self.least for candidate in candidates)


class Round:
    """Plays rounds of sequences with looked-up blocks of given confidences."""

    def __init__(self) -> None:
        self.planner, self.confidences, self.drafted = Asked(), (0.9, 0.9), 0
        drafting = SimpleNamespace(block_size=4, apart=False, propose=self._propose)
        self._turns = DraftTurns(self.planner, drafting, self)  # type: ignore[arg-type]

    def propose(self, sequences: Sequence[SequenceState]) -> dict[str, DraftBlock]:
        tokens = (7,) * len(self.confidences)
        return {
            one.sequence_id: DraftBlock(one.sequence_id, tokens, self.confidences, origin=DraftOrigin.LOOKUP)
            for one in sequences
            if tokens
        }

    def _propose(self, wanted: Sequence[SequenceState]) -> object:
        self.drafted += len(wanted)
        return NO_DRAFTS

    def release(self, name: str) -> None:
        self._turns.release(name)

    def go(self, names: str, confidences: tuple[float, ...], floor: float | None = None) -> int:
        """Plays a round; returns how often the planner was asked."""
        before, self.confidences = self.planner.questions, confidences
        members = [
            SequenceState(replace(request(name, [1, 2]), min_tokens_per_second=floor), order, 0, 99)
            for order, name in enumerate(names)
        ]
        taken, drafts = self._turns.take(members)
        assert taken == members
        assert set(drafts.blocks) == (set(names) if confidences else set())
        return self.planner.questions - before


def test_equal_promises_are_asked_about_once_in_some_rounds() -> None:
    rounds = Round()
    asked = [rounds.go("a", (0.9, 0.9 + 0.001 * n)) for n in range(3 * (LEFT_ROUNDS + 1))]
    assert asked == [1, *(0,) * LEFT_ROUNDS] * 3
    assert rounds.drafted == 0


def test_what_promises_less_or_is_another_requests_is_asked_about_at_once() -> None:
    rounds = Round()
    assert rounds.go("a", (0.9, 0.9)) == 1
    assert rounds.go("a", (0.9, 0.8)) == 1
    assert rounds.go("a", (0.9, 0.8)) == 0
    assert rounds.go("b", (0.9, 0.9)) == 1
    assert rounds.go("b", ()) == 1
    assert rounds.drafted == 1  # the one with nothing looked up
    assert rounds.go("b", (0.9, 0.9)) == 1


def test_several_who_are_left_without_drafts_are_asked_about_once_in_some_rounds() -> None:
    rounds = Round()
    rounds.planner.least = 0.0
    assert [rounds.go("ab", ()) for _ in range(2 * (LEFT_ROUNDS + 1))] == [1, *(0,) * LEFT_ROUNDS] * 2
    assert rounds.go("ab", (0.9,)) == 1  # due again
    assert rounds.go("ab", (0.8,)) == 1  # looked-up tokens promise less
    assert rounds.go("abc", (0.8,)) == 1
    assert rounds.go("bc", (0.8,)) == 1
    assert rounds.drafted == 0


def test_a_name_that_is_used_again_is_asked_about() -> None:
    rounds = Round()
    assert [rounds.go("a", (0.9, 0.9)) for _ in range(2)] == [1, 0]
    rounds.release("a")
    assert rounds.go("a", (0.9, 0.9)) == 1


def test_who_was_drafted_for_or_was_promised_a_speed_is_asked_about_in_every_round() -> None:
    rounds = Round()
    assert [rounds.go("a", (0.4, 0.4)) for _ in range(3)] == [1, 1, 1]
    assert rounds.drafted == 3
    assert [rounds.go("ab", (0.9, 0.9), floor=9.0) for _ in range(3)] == [1, 1, 1]
