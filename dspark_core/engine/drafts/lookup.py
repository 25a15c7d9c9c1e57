"""Drafts without a drafter: looks up what followed a sequence's last tokens before.

Sources are the sequence's own text and, if configured, a table of the target's n-grams.

A block is a function of committed tokens alone. Under rejection sampling its distribution is therefore a
point mass, and no choice of verify length can bias what is accepted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from dspark_core.algorithms.lookup_survival import LookupSurvival
from dspark_core.algorithms.lookup_worth import LookupWorth
from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.engine.drafts.drafting import draft_limit
from dspark_core.engine.drafts.lookup_chains import lookup_chains
from dspark_core.engine.drafts.plan_inputs import sampling_group
from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.protocols import DraftBlock, SparseDistribution
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.verdicts.acceptance import Proposal, Verdict
from dspark_core.records import DraftOrigin, Verification

BLOCK_TOKENS = 15
"""With the anchor 16 rows, a multiple of the eight that the target's kernels compute together."""
UNUSED_ROUNDS, LOOK_ROUNDS = 8, 7
"""After UNUSED_ROUNDS rounds without a looked-up token verified, only one round in LOOK_ROUNDS looks up: in
large batches few tokens pay, and looking up takes a percent or two of a round. LOOK_ROUNDS is odd, otherwise
one of two cohorts in turns would never look up."""
FORCED_CONFIDENCE = 0.99
"""Confidence of a token that a grammar forces, usually as the only one allowed."""
MAX_GROUPS = 64
"""Sampling groups with separate acceptance statistics; the least recently used one is dropped."""


class LookupDrafting:
    """Proposes blocks from the sequences' own text and a table, and learns how often they are accepted."""

    def __init__(self, table: NgramTable | None = None, *, always: bool = False) -> None:
        """`table` of the target's n-grams; None: look up only in the text itself. `always`: look up whether
        or not it pays, to measure acceptance."""
        self._always = always
        self._chains = lookup_chains(table)
        self._groups: OrderedDict[str, LookupSurvival] = OrderedDict()
        self._of_sequence: dict[str, LookupSurvival] = {}
        self._promised: dict[str, tuple[float, ...]] = {}
        """Uncorrected survival of each pending block, before its group's statistics were applied."""
        self._round = 0
        self._unused_rounds = 0
        self._worth = LookupWorth()
        self._looked: dict[str, bool] = {}
        """For each sequence, whether its coming round looks up, if that was a choice."""

    @property
    def remembered(self) -> int:
        """Number of sequences whose text is indexed."""
        return self._chains.remembered

    def propose(self, sequences: Sequence[SequenceState]) -> dict[str, DraftBlock]:
        """Blocks by sequence id, for sequences with something to propose."""
        self._round += 1
        if not self._looks(sequences):
            return {}
        if self._unused_rounds >= UNUSED_ROUNDS and self._round % LOOK_ROUNDS:
            return {}
        asking = [(s, draft_limit(s, BLOCK_TOKENS)) for s in sequences if _allowed(s)]
        asking = [(sequence, most) for sequence, most in asking if most > 0]
        if not asking:
            return {}
        found = self._chains.chains([sequence for sequence, _ in asking], [most for _, most in asking])
        blocks = {}
        for (sequence, most), (token_ids, promised) in zip(asking, found, strict=True):
            if sequence.grammar is not None:
                token_ids, promised = _grammatical(sequence.grammar, token_ids, promised, most)
            if token_ids:
                self._promised[sequence.sequence_id] = promised
                blocks[sequence.sequence_id] = self._block(sequence, token_ids, promised)
        return blocks

    def learn(self, proposals: Sequence[Proposal], verdicts: Sequence[Verdict]) -> None:
        """Learns from the outcome of this round's blocks."""
        promised = {p.sequence.sequence_id: self._promised.pop(p.sequence.sequence_id, ()) for p in proposals}
        if any(promised.values()):
            used = any(p.block.origin is DraftOrigin.LOOKUP and p.verify_length for p in proposals)
            self._unused_rounds = 0 if used else self._unused_rounds + 1
        for proposal, verdict in zip(proposals, verdicts, strict=False):
            if proposal.block.origin is DraftOrigin.LOOKUP and proposal.verify_length:
                name = proposal.sequence.sequence_id
                survival = self._of_sequence[name]
                survival.learn(promised[name], proposal.verify_length, verdict.accepted)

    def timed(self, proposals: Sequence[Proposal], verdicts: Sequence[Verdict], seconds: float) -> None:
        """Learns from the total time of a round without prefill."""
        ways = {self._looked.get(proposal.sequence.sequence_id) for proposal in proposals}
        looked = ways.pop() if len(ways) == 1 else None
        if looked is not None:
            tokens = sum(1 + verdict.accepted for verdict in verdicts)
            self._worth.learn(len(proposals), looked, tokens, seconds)

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended; unknown ids are ignored."""
        self._chains.release(sequence_id)
        self._of_sequence.pop(sequence_id, None)
        self._promised.pop(sequence_id, None)
        self._looked.pop(sequence_id, None)

    def _looks(self, sequences: Sequence[SequenceState]) -> bool:
        """Whether to look up this round. Always with a grammar: tokens it forces are sure to be accepted."""
        if self._always or len(sequences) < 2:
            return True
        if any(sequence.grammar is not None for sequence in sequences):
            for sequence in sequences:
                self._looked.pop(sequence.sequence_id, None)
            return True
        looks = self._worth.looks(len(sequences))
        self._looked.update((sequence.sequence_id, looks) for sequence in sequences)
        return looks

    def _block(
        self, sequence: SequenceState, token_ids: tuple[int, ...], promised: tuple[float, ...]
    ) -> DraftBlock:
        return DraftBlock(
            sequence.sequence_id,
            token_ids,
            self._survival(sequence).confidences(promised),
            distribution=_point_masses(token_ids) if _drawn(sequence) else None,
            origin=DraftOrigin.LOOKUP,
        )

    def _survival(self, sequence: SequenceState) -> LookupSurvival:
        known = self._of_sequence.get(sequence.sequence_id)
        if known is None:
            group = sampling_group(sequence.request)
            known = self._of_sequence[sequence.sequence_id] = self._groups.setdefault(group, LookupSurvival())
            self._groups.move_to_end(group)
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        return known


def _allowed(sequence: SequenceState) -> bool:
    speculation = sequence.request.speculation
    return speculation.enabled and speculation.lookup


def _grammatical(
    grammar: SequenceGrammar, token_ids: tuple[int, ...], promised: tuple[float, ...], most: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The tokens that the grammar forces, if any; otherwise the allowed prefix of the looked-up ones."""
    forced = grammar.forced()[:most]
    if forced:
        return forced, (FORCED_CONFIDENCE,) * len(forced)
    valid = grammar.valid(token_ids)
    return token_ids[:valid], promised[:valid]


def _drawn(sequence: SequenceState) -> bool:
    """Whether acceptance needs the draft's distribution."""
    request = sequence.request
    return request.verification is Verification.REJECTION and not request.sampling.greedy


def _point_masses(token_ids: Sequence[int]) -> SparseDistribution:
    return SparseDistribution(
        token_ids=torch.tensor(token_ids, dtype=torch.long)[:, None],
        probabilities=torch.ones((len(token_ids), 1)),
    )
