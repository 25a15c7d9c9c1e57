"""Masks logits so that tokens which a request's grammar does not allow are never drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.verdicts.acceptance import ShapedRows
from dspark_core.engine.verdicts.logit_adjusting import BANNED


@torch.inference_mode()
def mask(logits: Tensor, shaped: Sequence[ShapedRows]) -> None:
    """Masks logits [rows, vocab] of the round in place. Rows after a draft token that the grammar rejects are
    left alone: nothing reads them. Where only an end token may follow, it stays allowed, whatever
    `min_tokens` and `ignore_eos` say."""
    for one in shaped:
        sequence = one.proposal.sequence
        if sequence.grammar is not None:
            allowed = _allowed_rows(sequence, sequence.grammar, one.proposal.draft_token_ids)
            _ban(logits[one.rows][: len(allowed)], allowed == 0)


def _ban(rows: Tensor, banned: npt.NDArray[np.bool_]) -> None:
    if rows.device.type == "cpu":
        # PyTorch would parallelise this, and its threads then spin on the cores of the next pass.
        np.copyto(rows.numpy(), BANNED, where=banned)
    else:
        rows.masked_fill_(to_device(torch.from_numpy(banned), rows.device), BANNED)


def _allowed_rows(
    sequence: SequenceState, grammar: SequenceGrammar, drafts: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """[rows, vocab]: 1 where allowed; fewer rows if the grammar rejects a draft token."""
    ahead, ends = grammar.ahead(), _Ends.of(sequence, grammar)
    rows = [ends.put_off(ahead.allowed(), 0)]
    if ahead.problem is not None:
        grammar.fail(ahead.problem)
    for token_id in drafts:
        if not ahead.take((token_id,)) or ahead.complete:
            break  # the token is rejected, or the sequence ends with it
        allowed = ahead.allowed()
        if ahead.problem is not None:
            break  # the sequence will fail if it gets there
        rows.append(ends.put_off(allowed, len(rows)))
    return np.stack(rows)


@dataclass(frozen=True, slots=True)
class _Ends:
    """Tokens that would end the sequence, to be held back while any other token may follow."""

    now: tuple[int, ...]
    """Held back until the output has `min_tokens`."""
    ever: tuple[int, ...]
    """Held back throughout: the model's own end tokens, where the request continues past them."""
    missing: int
    """Tokens still missing from `min_tokens`."""

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
        """Removes them in place, unless nothing else is allowed. `row` counts from the end of the output."""
        chosen = self.now if row < self.missing else self.ever
        token_ids = [token_id for token_id in chosen if token_id < len(allowed)]
        if token_ids:
            kept = allowed[token_ids]
            allowed[token_ids] = 0
            if not np.count_nonzero(allowed):
                allowed[token_ids] = kept
        return allowed
