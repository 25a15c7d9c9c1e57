"""Keeps what a grammar does not allow from being drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.acceptance import ShapedRows
from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.logit_adjusting import BANNED
from dspark_core.engine.sequence import SequenceState


@torch.inference_mode()
def mask(logits: Tensor, shaped: Sequence[ShapedRows]) -> None:
    """logits [rows, vocab] of the round, changed in place. Rows behind a draft token that may not stand are
    left as they are: nothing reads them. Where nothing but the end may follow, it follows, whatever
    `min_tokens` and `ignore_eos` say."""
    for one in shaped:
        sequence = one.proposal.sequence
        if sequence.grammar is not None:
            allowed = _allowed_rows(sequence, sequence.grammar, one.proposal.draft_token_ids)
            _ban(logits[one.rows][: len(allowed)], allowed == 0)


def _ban(rows: Tensor, banned: npt.NDArray[np.bool_]) -> None:
    if rows.device.type == "cpu":
        # PyTorch would share so much out among threads that go on spinning beside the next pass.
        np.copyto(rows.numpy(), BANNED, where=banned)
    else:
        rows.masked_fill_(to_device(torch.from_numpy(banned), rows.device), BANNED)


def _allowed_rows(
    sequence: SequenceState, grammar: SequenceGrammar, drafts: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """[rows, vocab]"""
    ahead, ends = grammar.ahead(), _Ends.of(sequence, grammar)
    rows = [ends.put_off(ahead.allowed(), 0)]
    if ahead.problem is not None:
        grammar.fail(ahead.problem)
    for token_id in drafts:
        if not ahead.take((token_id,)) or ahead.complete:
            break  # it may not stand, or the sequence ends there
        allowed = ahead.allowed()
        if ahead.problem is not None:
            break  # the sequence fails there, if it comes there
        rows.append(ends.put_off(allowed, len(rows)))
    return np.stack(rows)


@dataclass(frozen=True, slots=True)
class _Ends:
    """Tokens that would end the sequence and should not yet, or at all, while anything else may follow."""

    now: tuple[int, ...]
    """While `min_tokens` are missing."""
    ever: tuple[int, ...]
    """Where the request goes on past the model's own end."""
    missing: int

    @classmethod
    def of(cls, sequence: SequenceState, grammar: SequenceGrammar) -> _Ends:
        request = sequence.request
        stops, own = set(request.stop_token_ids), set(grammar.end_token_ids)
        output = len(sequence.tokens) - len(request.prompt_token_ids) + request.generated_tokens
        return cls(
            now=tuple(sorted(stops | own)),
            ever=tuple(sorted(own - stops)),
            missing=request.adjustments.min_tokens - output,
        )

    def put_off(self, allowed: npt.NDArray[np.uint8], row: int) -> npt.NDArray[np.uint8]:
        """Without them, unless nothing else is allowed; in place. row: of those after the output so far."""
        chosen = self.now if row < self.missing else self.ever
        token_ids = [token_id for token_id in chosen if token_id < len(allowed)]
        if token_ids:
            kept = allowed[token_ids]
            allowed[token_ids] = 0
            if not np.count_nonzero(allowed):
                allowed[token_ids] = kept
        return allowed
