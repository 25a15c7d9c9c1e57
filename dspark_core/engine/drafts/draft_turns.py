"""Chooses which sequences take part in a round, all or one of two cohorts in turns, and gets their drafts.

In turns, one cohort is drafted for while the target computes the other, which requires a drafter that runs
apart from the target. Drafts are requested when a cohort's round ends and awaited when its next begins.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.engine.drafts.drafting import DraftFlight, Drafting, DraftRound
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.drafts.plan_inputs import draft_candidates
from dspark_core.engine.protocols import DraftBlock, PlanSource
from dspark_core.engine.sequence import SequenceState

DECISION_ROUNDS = 16
"""Rounds for which a decision for or against turns holds: switching leaves a cohort without hidden drafts."""
FIRST_REST_ROUNDS, MAX_REST_ROUNDS = 256, 4096
"""Rounds without turns after turns that hid nothing because nobody was drafted for: at first and at most,
doubling in between."""
ALL, IN_TURNS = 1, 2
"""Numbers of cohorts."""
LEFT_ROUNDS = 16
"""After the planner left all sequences of a round without drafts, it is not asked for up to this many rounds,
as long as the sequences stay the same and their looked-up tokens promise no less: asking took 1 to 2 % of a
small round."""


@dataclass(slots=True, eq=False)
class _Asked:
    """Drafts requested ahead of a cohort's round."""

    lengths: dict[str, int]
    """Token count of each sequence at the request; once it differs, the drafts no longer continue it."""
    lookups: dict[str, DraftBlock]
    flight: DraftFlight | None
    """None if nobody is drafted for."""


@dataclass(slots=True)
class _Left:
    """A set of sequences that the planner left entirely without drafts."""

    promises: dict[str, float]
    """Expected accepted looked-up tokens by sequence id."""
    rounds_left: int = LEFT_ROUNDS

    def covers(self, promises: Mapping[str, float]) -> bool:
        return (
            self.rounds_left > 0
            and promises.keys() == self.promises.keys()
            and all(promise >= self.promises[name] for name, promise in promises.items())
        )


def _promise(block: DraftBlock | None) -> float:
    return 0.0 if block is None else sum(survival_from_confidence(block.confidences))


class DraftTurns:
    def __init__(
        self,
        planner: PlanSource,
        drafting: Drafting | None,
        lookup: LookupDrafting | None,
        cohorts: int | None = None,
    ) -> None:
        """`cohorts`: 1 or 2; 2 applies only if the drafter runs apart from the target. None: the planner
        decides."""
        self._planner = planner
        self._drafting = drafting
        self._lookup = lookup
        self._wish = cohorts
        self._given: int | None = ALL
        self._rounds_left = 0
        self._undrafted_rounds = 0
        """Consecutive rounds in turns without anyone drafted for."""
        self._rest, self._next_rest = 0, FIRST_REST_ROUNDS
        self._cohort: dict[str, int] = {}
        """Cohort of each decoding sequence while cohorts take turns."""
        self._turn = 0
        self._asked: list[_Asked] = []
        self._left: _Left | None = None
        self.cohorts = ALL

    def take(self, decoding: Sequence[SequenceState]) -> tuple[list[SequenceState], DraftRound]:
        """Returns the sequences of `decoding` that take part in this round, and their drafts."""
        self._decide(decoding)
        members = list(decoding)
        if self.cohorts == IN_TURNS:
            self._assign(decoding)
            self._turn = 1 - self._turn
            members = self._members(decoding)
            if not members:  # the whole cohort has ended
                self._turn = 1 - self._turn
                members = self._members(decoding)
        drafts = self._landed(members) if self._asked else None
        return members, self._proposed(members) if drafts is None else drafts

    def end(self, running: Sequence[SequenceState]) -> None:
        """Ends a round after which `running` remain: requests drafts for its cohort, to be made during the
        other cohort's round."""
        if self.cohorts == ALL:
            return
        decoding = sorted((s for s in running if s.decoding), key=lambda s: s.order)
        if len(decoding) < IN_TURNS:
            return
        self._assign(decoding)
        self._even_out()
        members = self._members(decoding)
        lookups, wanted = self._wanted(members)
        flight = self._drafting.begin(wanted) if self._drafting else None
        self._asked.append(_Asked({s.sequence_id: len(s.tokens) for s in members}, lookups, flight))
        self._undrafted_rounds = 0 if flight is not None else self._undrafted_rounds + 1
        if flight is not None:
            self._next_rest = FIRST_REST_ROUNDS

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended; unknown ids are ignored."""
        self._cohort.pop(sequence_id, None)
        for asked in self._asked:
            asked.lengths.pop(sequence_id, None)
        self._asked = [asked for asked in self._asked if asked.lengths]
        if self._left is not None and sequence_id in self._left.promises:
            self._left = None

    def _decide(self, decoding: Sequence[SequenceState]) -> None:
        given = self._wish if self._may_take_turns(decoding) else ALL
        if given == self._given and (given == ALL or self._rounds_left > 0):
            self._rounds_left -= 1
            return
        self._given, self._rounds_left = given, DECISION_ROUNDS - 1
        candidates = draft_candidates(decoding, self._drafting.block_size, {}) if self._drafting else []
        self.cohorts = self._planner.cohorts(candidates, given)
        self._undrafted_rounds = 0
        if self.cohorts == ALL:
            self._cohort.clear()

    def _may_take_turns(self, decoding: Sequence[SequenceState]) -> bool:
        """Not while the drafter is unavailable, nor soon after turns that hid nothing."""
        if self._drafting is None or not self._drafting.apart or len(decoding) < IN_TURNS:
            return False
        if self._wish is None and self._undrafted_rounds >= DECISION_ROUNDS:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, MAX_REST_ROUNDS)
            self._undrafted_rounds = 0
        self._rest = max(self._rest - 1, 0)
        return self._drafting.available and self._rest == 0

    def _assign(self, decoding: Sequence[SequenceState]) -> None:
        """Puts new sequences into the smaller cohort; if equal, into the one whose turn it is."""
        self._cohort = {s.sequence_id: self._cohort[s.sequence_id] for s in decoding if self._known(s)}
        sizes = Counter(self._cohort.values())
        for sequence in decoding:
            if not self._known(sequence):
                other = 1 - self._turn
                cohort = other if sizes[other] < sizes[self._turn] else self._turn
                self._cohort[sequence.sequence_id] = cohort
                sizes[cohort] += 1

    def _even_out(self) -> None:
        """Moves the newest sequences of the cohort that just had its round, for which nothing is drafted yet,
        to the other cohort while that is smaller by two or more."""
        sizes = Counter(self._cohort.values())
        surplus = (sizes[self._turn] - sizes[1 - self._turn]) // IN_TURNS
        mine = [name for name, cohort in self._cohort.items() if cohort == self._turn]
        for name in mine[len(mine) - max(surplus, 0) :]:
            self._cohort[name] = 1 - self._turn

    def _known(self, sequence: SequenceState) -> bool:
        return sequence.sequence_id in self._cohort

    def _members(self, decoding: Sequence[SequenceState]) -> list[SequenceState]:
        return [s for s in decoding if self._cohort[s.sequence_id] == self._turn]

    def _wanted(
        self, sequences: Sequence[SequenceState]
    ) -> tuple[dict[str, DraftBlock], list[SequenceState]]:
        """Looked-up blocks, and the sequences for which the planner wants drafts nevertheless."""
        lookups = self._lookup.propose(sequences) if self._lookup else {}
        if self._drafting is None or not sequences:
            return lookups, []
        promises = {s.sequence_id: _promise(lookups.get(s.sequence_id)) for s in sequences}
        if self._left is not None and self._left.covers(promises):
            self._left.rounds_left -= 1
            return lookups, []
        candidates = draft_candidates(sequences, self._drafting.block_size, lookups)
        wanted = self._planner.wants_draft(candidates)
        floors = any(s.request.min_tokens_per_second for s in sequences)
        self._left = None if floors or any(wanted) else _Left(promises)
        return lookups, [s for s, wants in zip(sequences, wanted, strict=True) if wants]

    def _proposed(self, members: Sequence[SequenceState]) -> DraftRound:
        """Requests drafts now and waits for them."""
        lookups, wanted = self._wanted(members)
        if self._drafting is None or not wanted:
            return DraftRound(lookups, 0.0)
        drafts = self._drafting.propose(wanted)
        return dataclasses.replace(drafts, blocks={**lookups, **drafts.blocks})

    def _landed(self, members: Sequence[SequenceState]) -> DraftRound | None:
        """Collects drafts requested earlier, or None; sequences that joined since go without."""
        names = {sequence.sequence_id for sequence in members}
        due = [asked for asked in self._asked if not names.isdisjoint(asked.lengths)]
        if not due:
            return None
        self._asked = [asked for asked in self._asked if asked not in due]
        rounds = [self._drafting.finish(one.flight) for one in due if self._drafting and one.flight]
        there = {name: block for one in due for name, block in one.lookups.items()}
        for one in rounds:
            there.update(one.blocks)
        lengths = {name: length for one in due for name, length in one.lengths.items()}
        blocks = {
            s.sequence_id: there[s.sequence_id]
            for s in members
            if s.sequence_id in there and lengths.get(s.sequence_id) == len(s.tokens)
        }
        if not rounds:
            return DraftRound(blocks, 0.0)
        return dataclasses.replace(
            rounds[0],
            blocks=blocks,
            seconds=sum(one.seconds for one in rounds),
            hidden_seconds=max(one.hidden_seconds for one in rounds),
            primed=any(one.primed for one in rounds),
        )
