"""Applies a request's biases and penalties to its logits before tokens are chosen.

A row after draft tokens counts them as output, so each token is judged as if those before it had been
committed one by one. A logit is changed by the same operations and numbers wherever in a draft its row is, so
the result is bitwise the same with speculation on and off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.verdicts.acceptance import Proposal, ShapedRows
from dspark_core.output_rules import NO_ADJUSTMENTS, LogitAdjustments

BANNED = -1e9
"""Logit of a token that must not be drawn; finite, since biases and penalties may still be applied to it."""


@dataclass(slots=True)
class _Output:
    """Token counts of one sequence's output, part of which another verifier may have generated."""

    counts: Counter[int] = field(default_factory=Counter)
    length: int = 0

    def follow(self, sequence: SequenceState) -> None:
        """Counts the tokens committed since the last call."""
        begins = len(sequence.request.prompt_token_ids) - sequence.request.generated_tokens
        self.counts.update(sequence.tokens[begins + self.length :])
        self.length = len(sequence.tokens) - begins


class LogitAdjuster:
    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    @torch.inference_mode()
    def apply(self, logits: Tensor, shaped: Sequence[ShapedRows]) -> None:
        """Changes logits [rows, vocab] of the round in place."""
        for one in shaped:
            if one.proposal.sequence.request.adjustments is not NO_ADJUSTMENTS:
                self._adjust(logits[one.rows], one.proposal)

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended; unknown ids are ignored."""
        self._outputs.pop(sequence_id, None)

    def _adjust(self, rows: Tensor, proposal: Proposal) -> None:
        sequence = proposal.sequence
        adjustments, drafts = sequence.request.adjustments, proposal.draft_token_ids
        output = self._outputs.setdefault(sequence.sequence_id, _Output())
        output.follow(sequence)
        # With a grammar, its mask enforces min_tokens, as far as anything else may follow.
        missing = 0 if sequence.grammar is not None else adjustments.min_tokens - output.length
        stops = [token_id for token_id in sequence.request.stop_token_ids if token_id < rows.shape[1]]
        if missing > 0 and stops:
            rows[:missing, _ids(stops, rows)] = BANNED
        if adjustments.logit_bias:
            token_ids, biases = zip(*adjustments.logit_bias, strict=True)
            rows[:, _ids(token_ids, rows)] += _values(biases, rows)
        if adjustments.repetition_penalty != 1.0:
            _repetition(rows, adjustments.repetition_penalty, {*sequence.tokens}, drafts)
        if adjustments.presence_penalty or adjustments.frequency_penalty:
            _counted(rows, adjustments, output.counts, drafts)


def _repetition(rows: Tensor, penalty: float, seen: Collection[int], drafts: Sequence[int]) -> None:
    rows[:, _ids(seen, rows)] = _repeated(rows[:, _ids(seen, rows)], penalty)
    for token_id in dict.fromkeys(drafts):
        if token_id not in seen:
            after = rows[drafts.index(token_id) + 1 :, token_id]
            after.copy_(_repeated(after, penalty))


def _repeated(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _counted(
    rows: Tensor, adjustments: LogitAdjustments, counts: Counter[int], drafts: Sequence[int]
) -> None:
    def penalty(count: int) -> float:
        return adjustments.presence_penalty + adjustments.frequency_penalty * count if count else 0.0

    drafted = {*drafts}
    settled = {token_id: count for token_id, count in counts.items() if token_id not in drafted}
    if settled:
        rows[:, _ids(settled, rows)] -= _values([penalty(count) for count in settled.values()], rows)
    for token_id in drafted:
        before = [counts[token_id] + drafts[:row].count(token_id) for row in range(len(rows))]
        rows[:, token_id] -= _values([penalty(count) for count in before], rows)


def _ids(token_ids: Collection[int], rows: Tensor) -> Tensor:
    return to_device(torch.tensor([*token_ids], dtype=torch.int64), rows.device)


def _values(values: Sequence[float], rows: Tensor) -> Tensor:
    return to_device(torch.tensor(values, dtype=rows.dtype), rows.device)
