"""Drafts without a drafter: what followed the last time a sequence's final tokens occurred in it.

The block is a function of committed tokens alone. Under rejection sampling its law is therefore a
point mass, and no choice of verify length can bias what is accepted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from dspark_core.algorithms.lookup_survival import LookupSurvival
from dspark_core.algorithms.suffix_match import SuffixIndex
from dspark_core.engine.acceptance import Proposal, Verdict
from dspark_core.engine.drafting import draft_limit
from dspark_core.engine.plan_inputs import sampling_group
from dspark_core.engine.protocols import DraftBlock, SparseDistribution
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import DraftOrigin, Verification

BLOCK_TOKENS = 15
"""With the anchor a multiple of eight rows, what the target's kernels compute together."""
UNUSED_ROUNDS, LOOK_ROUNDS = 8, 8
"""After so many rounds in a row of which no looked-up token was verified, only one in so many is looked up:
in large batches few tokens pay, and looking takes a percent or two of a round."""
MAX_GROUPS = 64
"""Kinds of sampling whose acceptance is known apart; the one asked about least recently is forgotten."""


class LookupDrafting:
    """Proposes blocks from the sequences' own text and learns how often they stand."""

    def __init__(self) -> None:
        self._indices: dict[str, SuffixIndex] = {}
        self._groups: OrderedDict[str, LookupSurvival] = OrderedDict()
        self._agreed: dict[str, int] = {}
        """Length of the match behind each block of this round."""
        self._round = 0
        self._unused_rounds = 0

    @property
    def remembered(self) -> int:
        """Sequences whose text is indexed."""
        return len(self._indices)

    def propose(self, sequences: Sequence[SequenceState]) -> dict[str, DraftBlock]:
        """Blocks by sequence id, of those whose last token occurred before."""
        self._agreed = {}
        self._round += 1
        if self._unused_rounds >= UNUSED_ROUNDS and self._round % LOOK_ROUNDS:
            return {}
        blocks = (self._block(sequence) for sequence in sequences if _allowed(sequence))
        return {block.sequence_id: block for block in blocks if block is not None}

    def learn(self, proposals: Sequence[Proposal], verdicts: Sequence[Verdict]) -> None:
        """What became of this round's blocks."""
        if self._agreed:
            used = any(p.block.origin is DraftOrigin.LOOKUP and p.verify_length for p in proposals)
            self._unused_rounds = 0 if used else self._unused_rounds + 1
        for proposal, verdict in zip(proposals, verdicts, strict=False):
            if proposal.block.origin is DraftOrigin.LOOKUP and proposal.verify_length:
                agreed = self._agreed[proposal.sequence.sequence_id]
                survival = self._survival(proposal.sequence)
                survival.learn(agreed, proposal.verify_length, verdict.accepted)

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended; unknown ids are ignored."""
        self._indices.pop(sequence_id, None)

    def _block(self, sequence: SequenceState) -> DraftBlock | None:
        most = draft_limit(sequence, BLOCK_TOKENS)
        if most < 1:
            return None
        index = self._indices.setdefault(sequence.sequence_id, SuffixIndex())
        match = index.longest(sequence.tokens, most)
        if match is None:
            return None
        self._agreed[sequence.sequence_id] = match.length
        count = len(match.token_ids)
        return DraftBlock(
            sequence.sequence_id,
            match.token_ids,
            self._survival(sequence).confidences(match.length, count),
            distribution=_point_masses(match.token_ids) if _drawn(sequence) else None,
            origin=DraftOrigin.LOOKUP,
        )

    def _survival(self, sequence: SequenceState) -> LookupSurvival:
        group = sampling_group(sequence.request)
        known = self._groups.setdefault(group, LookupSurvival())
        self._groups.move_to_end(group)
        if len(self._groups) > MAX_GROUPS:
            self._groups.popitem(last=False)
        return known


def _allowed(sequence: SequenceState) -> bool:
    speculation = sequence.request.speculation
    return speculation.enabled and speculation.lookup


def _drawn(sequence: SequenceState) -> bool:
    """Whether acceptance needs to know the law of the draft."""
    request = sequence.request
    return request.verification is Verification.REJECTION and not request.sampling.greedy


def _point_masses(token_ids: Sequence[int]) -> SparseDistribution:
    return SparseDistribution(
        token_ids=torch.tensor(token_ids, dtype=torch.long)[:, None],
        probabilities=torch.ones((len(token_ids), 1)),
    )
