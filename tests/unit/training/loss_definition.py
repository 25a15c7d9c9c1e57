"""The losses of a draft block as the paper defines them, in plain autograd: what the fused ones must equal.

The target distribution comes as its probabilities over the draft vocabulary, normalised over the whole
one: what it puts elsewhere counts in full as missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.models.layers import soft_cap
from dspark_core.training.losses import OUTSIDE_DRAFT_VOCAB, LossTerm


@dataclass(frozen=True, slots=True)
class BlockLosses:
    cross_entropy: LossTerm
    distance: LossTerm
    """L1 between draft and target distribution."""
    confidence: LossTerm
    """Binary cross-entropy against the acceptance probability; counts nothing without the head."""
    acceptance: Tensor  # [requests, block], detached: 1 - L1/2


def target_probabilities(
    hidden: Tensor, lm_head: Tensor, log_normalizers: Tensor, softcap: float | None = None
) -> Tensor:
    """hidden [..., d], lm_head [draft vocab, d], log_normalizers [...] (over the full vocabulary)
    -> probabilities [..., draft vocab] float32 that sum to at most one."""
    logits = soft_cap(F.linear(hidden, lm_head).float(), softcap)
    return (logits - log_normalizers[..., None]).exp()


def block_losses(
    logits: Tensor,
    confidence_logits: Tensor | None,
    labels: Tensor,
    target: Tensor,
    weights: Tensor,
) -> BlockLosses:
    """logits, target [requests, block, draft vocab]; labels (draft vocabulary indices, or
    OUTSIDE_DRAFT_VOCAB), weights (zero: not counted) and confidence_logits [requests, block]."""
    log_draft = torch.log_softmax(logits.float(), dim=-1)
    inside = (labels != OUTSIDE_DRAFT_VOCAB) * weights
    nll = -log_draft.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    missed = (1 - target.sum(dim=-1)).clamp_min(0)
    distance = (log_draft.exp() - target).abs().sum(dim=-1) + missed
    acceptance = (1 - 0.5 * distance.detach()).clamp(0, 1)
    none = weights.new_zeros(())
    confidence = LossTerm(none, none)
    if confidence_logits is not None:
        bce = F.binary_cross_entropy_with_logits(confidence_logits.float(), acceptance, reduction="none")
        confidence = LossTerm((bce * weights).sum(), weights.sum())
    return BlockLosses(
        cross_entropy=LossTerm((nll * inside).sum(), inside.sum()),
        distance=LossTerm((distance * weights).sum(), weights.sum()),
        confidence=confidence,
        acceptance=acceptance,
    )
