"""Log-probabilities of committed tokens, on request, from the target's unadjusted logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.engine.verdicts.acceptance import ShapedRows
from dspark_core.output_rules import NO_ADJUSTMENTS
from dspark_core.records import TokenLogprobs


@torch.inference_mode()
def logprob_rows(logits: Tensor, shaped: Sequence[ShapedRows]) -> dict[int, Tensor]:
    """logits [rows, vocab] of the round before adjustment -> rows [1 + verify_length, vocab] of the requests
    that ask, by proposal index."""
    rows: dict[int, Tensor] = {}
    for one in shaped:
        sequence = one.proposal.sequence
        if sequence.request.top_logprobs is not None:
            changed = sequence.request.adjustments is not NO_ADJUSTMENTS or sequence.grammar is not None
            rows[one.index] = _copied(logits[one.rows]) if changed else logits[one.rows]
    return rows


def _copied(rows: Tensor) -> Tensor:
    if rows.device.type == "cpu":
        # PyTorch would parallelise this, and its threads then spin on the cores of the next pass.
        return torch.from_numpy(rows.numpy().copy())
    return rows.clone()


@torch.inference_mode()
def token_logprobs(rows: Tensor, token_ids: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """rows [at least as many as tokens, vocab]: row i holds the logits that token i was drawn from."""
    laws = rows[: len(token_ids)].log_softmax(dim=-1)
    chosen = laws.gather(1, torch.tensor(token_ids, device=laws.device)[:, None])[:, 0].tolist()
    if not top:
        return tuple(TokenLogprobs(logprob) for logprob in chosen)
    likeliest = laws.topk(min(top, laws.shape[1]), dim=-1)
    found = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return tuple(
        TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(chosen, found, strict=True)
    )
