"""Keeps what a grammar does not allow from being drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.acceptance import ShapedRows
from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.logit_adjusting import BANNED


@torch.inference_mode()
def mask(logits: Tensor, shaped: Sequence[ShapedRows]) -> None:
    """logits [rows, vocab] of the round, changed in place. Rows behind a draft token that may not stand are
    left as they are: nothing reads them. Where nothing but the end may follow, it follows, whatever
    `min_tokens` says."""
    for one in shaped:
        sequence = one.proposal.sequence
        if sequence.grammar is not None:
            allowed = _allowed_rows(sequence.grammar, one.proposal.draft_token_ids)
            rows = logits[one.rows][: len(allowed)]
            _ban(rows, allowed == 0)
            if sequence.request.adjustments.min_tokens:
                _allow_the_end(rows, allowed, sequence.request.stop_token_ids)


def _ban(rows: Tensor, banned: npt.NDArray[np.bool_]) -> None:
    if rows.device.type == "cpu":
        # PyTorch would share so much out among threads that go on spinning beside the next pass.
        np.copyto(rows.numpy(), BANNED, where=banned)
    else:
        rows.masked_fill_(to_device(torch.from_numpy(banned), rows.device), BANNED)


def _allow_the_end(rows: Tensor, allowed: npt.NDArray[np.uint8], stop_token_ids: Sequence[int]) -> None:
    stops = [token_id for token_id in stop_token_ids if token_id < allowed.shape[1]]
    ends = allowed.sum(axis=1) == allowed[:, stops].sum(axis=1)
    for row in ends.nonzero()[0].tolist():
        rows[row, [token_id for token_id in stops if allowed[row, token_id]]] = 0.0


def _allowed_rows(grammar: SequenceGrammar, drafts: Sequence[int]) -> npt.NDArray[np.uint8]:
    """[rows, vocab]"""
    ahead = grammar.ahead()
    rows = [ahead.allowed()]
    if ahead.problem is not None:
        grammar.fail(ahead.problem)
    for token_id in drafts:
        if not ahead.take((token_id,)) or ahead.complete:
            break  # it may not stand, or the sequence ends there
        allowed = ahead.allowed()
        if ahead.problem is not None:
            break  # the sequence fails there, if it comes there
        rows.append(allowed)
    return np.stack(rows)
