"""Who takes part in a round and with which drafts: everybody, or two cohorts in turns.

In turns, a cohort is drafted for while the target computes the other, which takes a drafter of its own. Its
drafts are asked for as soon as its round is over and awaited when its next one begins.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.engine.drafting import NO_DRAFTS, DraftFlight, Drafting, DraftRound
from dspark_core.engine.lookup import LookupDrafting
from dspark_core.engine.plan_inputs import draft_candidates
from dspark_core.engine.protocols import DraftBlock, PlanSource
from dspark_core.engine.sequence import SequenceState

DECISION_ROUNDS = 16
"""So long a decision for or against turns holds: changing leaves a cohort without hidden drafts."""
ALL, IN_TURNS = 1, 2
"""Cohorts."""


@dataclass(slots=True, eq=False)
class _Asked:
    """What will be there for sequences whose round is not yet."""

    sequence_ids: set[str]
    """All of the cohort."""
    lookups: dict[str, DraftBlock]
    flight: DraftFlight | None
    """None: nobody is drafted for."""


class DraftTurns:
    def __init__(
        self,
        planner: PlanSource,
        drafting: Drafting | None,
        lookup: LookupDrafting | None,
        cohorts: int | None = None,
    ) -> None:
        """`cohorts`: 1 or 2, where the drafter computes apart from the target; None: the planner decides."""
        self._planner = planner
        self._drafting = drafting
        self._lookup = lookup
        self._wish = cohorts
        self._given: int | None = ALL
        self._rounds_left = 0
        self._cohort: dict[str, int] = {}
        """Of each sequence that decodes, while there are two."""
        self._turn = 0
        self._asked: list[_Asked] = []
        self._ready: dict[str, DraftBlock] = {}
        """Blocks that came with those of others."""
        self.cohorts = ALL

    def take(self, decoding: Sequence[SequenceState]) -> tuple[list[SequenceState], DraftRound]:
        """Those of `decoding` whose round it is, and their drafts."""
        self._decide(decoding)
        members = list(decoding)
        if self.cohorts == IN_TURNS:
            self._assign(decoding)
            self._turn = 1 - self._turn
            members = self._members(decoding)
        drafts = self._landed(members) if self._asked or self._ready else None
        return members, self._proposed(members) if drafts is None else drafts

    def end(self, running: Sequence[SequenceState]) -> None:
        """The round is over, `running` are left: who had it is drafted for while the others have theirs."""
        if self.cohorts == ALL:
            return
        decoding = sorted((s for s in running if s.decoding), key=lambda s: s.order)
        if len(decoding) < IN_TURNS:
            return
        self._assign(decoding)
        members = self._members(decoding)
        lookups, wanted = self._wanted(members)
        flight = self._drafting.begin(wanted) if self._drafting else None
        self._asked.append(_Asked({s.sequence_id for s in members}, lookups, flight))

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended; unknown ids are ignored."""
        self._cohort.pop(sequence_id, None)
        self._ready.pop(sequence_id, None)
        for asked in self._asked:
            asked.sequence_ids.discard(sequence_id)
        self._asked = [asked for asked in self._asked if asked.sequence_ids]

    def _decide(self, decoding: Sequence[SequenceState]) -> None:
        possible = self._drafting is not None and self._drafting.apart and len(decoding) >= IN_TURNS
        given = self._wish if possible else ALL
        if given == self._given and (given == ALL or self._rounds_left > 0):
            self._rounds_left -= 1
            return
        self._given, self._rounds_left = given, DECISION_ROUNDS - 1
        candidates = draft_candidates(decoding, self._drafting.block_size, {}) if self._drafting else []
        self.cohorts = self._planner.cohorts(candidates, given)
        if self.cohorts == ALL:
            self._cohort.clear()

    def _assign(self, decoding: Sequence[SequenceState]) -> None:
        """Everybody to a cohort, both of one size: newcomers where there are fewer, or where a round has just
        ended; then the latest are moved, until sizes differ by one at most."""
        self._cohort = {s.sequence_id: self._cohort[s.sequence_id] for s in decoding if self._known(s)}
        sizes = Counter(self._cohort.values())
        for sequence in decoding:
            if not self._known(sequence):
                other = 1 - self._turn
                cohort = other if sizes[other] < sizes[self._turn] else self._turn
                self._cohort[sequence.sequence_id] = cohort
                sizes[cohort] += 1
        larger = 0 if sizes[0] > sizes[1] else 1
        for sequence_id in reversed(list(self._cohort)):
            if sizes[larger] - sizes[1 - larger] < IN_TURNS:
                break
            if self._cohort[sequence_id] == larger:
                self._cohort[sequence_id] = 1 - larger
                sizes.update({larger: -1, 1 - larger: 1})

    def _known(self, sequence: SequenceState) -> bool:
        return sequence.sequence_id in self._cohort

    def _members(self, decoding: Sequence[SequenceState]) -> list[SequenceState]:
        return [s for s in decoding if self._cohort[s.sequence_id] == self._turn]

    def _wanted(
        self, sequences: Sequence[SequenceState]
    ) -> tuple[dict[str, DraftBlock], list[SequenceState]]:
        """What was looked up, and for whom the planner wants drafts all the same."""
        lookups = self._lookup.propose(sequences) if self._lookup else {}
        if self._drafting is None or not sequences:
            return lookups, []
        candidates = draft_candidates(sequences, self._drafting.block_size, lookups)
        wanted = self._planner.wants_draft(candidates)
        return lookups, [s for s, wants in zip(sequences, wanted, strict=True) if wants]

    def _proposed(self, members: Sequence[SequenceState]) -> DraftRound:
        """Asked for now and awaited."""
        lookups, wanted = self._wanted(members)
        drafts = self._drafting.propose(wanted) if self._drafting else NO_DRAFTS
        return dataclasses.replace(drafts, blocks={**lookups, **drafts.blocks})

    def _landed(self, members: Sequence[SequenceState]) -> DraftRound | None:
        """What was asked for before; None: nothing, of any of them. Who joined since goes without."""
        names = {sequence.sequence_id for sequence in members}
        due = [asked for asked in self._asked if not names.isdisjoint(asked.sequence_ids)]
        if not due and names.isdisjoint(self._ready):
            return None
        self._asked = [asked for asked in self._asked if asked not in due]
        seconds, hidden, primed = 0.0, 0.0, False
        for asked in due:
            self._ready.update(asked.lookups)
            if self._drafting is not None and asked.flight is not None:
                drafts = self._drafting.finish(asked.flight)
                self._ready.update(drafts.blocks)
                seconds, hidden = seconds + drafts.seconds, max(hidden, drafts.hidden_seconds)
                primed = primed or drafts.primed
        blocks = {name: self._ready.pop(name) for name in names if name in self._ready}
        return DraftRound(blocks, seconds, primed, hidden)
