"""Keeps what a grammar does not allow from being drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.acceptance import Proposal
from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.logit_adjusting import BANNED


@torch.inference_mode()
def mask(logits: Tensor, proposals: Sequence[Proposal]) -> None:
    """logits [sum of (1 + verify_length), vocab] in the order of the proposals, changed in place. Rows behind
    a draft token that may not stand are left as they are: nothing reads them."""
    start = 0
    for proposal in proposals:
        end = start + 1 + proposal.verify_length
        grammar = proposal.sequence.grammar
        if grammar is not None:
            allowed = _allowed_rows(grammar, proposal.draft_token_ids)
            banned = to_device(torch.from_numpy(allowed == 0), logits.device)
            logits[start : start + len(banned)].masked_fill_(banned, BANNED)
        start = end


def _allowed_rows(grammar: SequenceGrammar, drafts: Sequence[int]) -> npt.NDArray[np.uint8]:
    """[rows, vocab]"""
    rows, taken = [grammar.allowed()], 0
    for token_id in drafts:
        if not grammar.take((token_id,)):
            break
        taken += 1
        if grammar.complete:
            break  # the sequence ends there
        rows.append(grammar.allowed())
    grammar.give_back(taken)
    return np.stack(rows)
