"""Losses over the vocabulary and their gradient, for drafters whose LM head is frozen and the last step.

Written out by hand: with nothing to learn between the hidden state and the logits, the gradient is
a matrix product away, and autograd would keep several vocabulary-sized tensors per position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.training.losses import OUTSIDE_DRAFT_VOCAB, LossTerm, target_probabilities


@dataclass(frozen=True, slots=True)
class HeadTarget:
    """What the target says about some draft positions."""

    hidden: Tensor  # [rows, d], after the final norm
    log_normalizers: Tensor  # [rows], over the full vocabulary
    labels: Tensor  # [rows] draft vocabulary indices, or OUTSIDE_DRAFT_VOCAB
    weights: Tensor  # [rows]; zero: not counted

    def __getitem__(self, rows: slice) -> HeadTarget:
        return HeadTarget(
            self.hidden[rows], self.log_normalizers[rows], self.labels[rows], self.weights[rows]
        )


@dataclass(frozen=True, slots=True)
class HeadScales:
    """What one unit of each loss's weighted sum adds to the loss that is minimised."""

    cross_entropy: float
    distance: float
    soft_labels: bool
    """Cross-entropy against the target's distribution instead of the token that followed."""


@dataclass(frozen=True, slots=True)
class HeadLosses:
    gradient: Tensor  # [rows, d], of the scaled loss in the hidden states
    cross_entropy: LossTerm
    distance: LossTerm
    acceptance: Tensor  # [rows]: 1 - L1/2


@torch.no_grad()
def frozen_head_losses(hidden: Tensor, lm_head: Tensor, target: HeadTarget, scales: HeadScales) -> HeadLosses:
    """hidden [rows, d], lm_head [draft vocab, d].

    Soft cross-entropy counts the target's probability inside the draft vocabulary; what lies
    outside cannot be drafted and teaches nothing.
    """
    logits = F.linear(hidden, lm_head).float()
    log_sums = logits.logsumexp(dim=-1)
    wanted = target_probabilities(target.hidden.to(lm_head.dtype), lm_head, target.log_normalizers)
    inside = wanted.sum(dim=-1)
    if scales.soft_labels:
        weights = target.weights
        mass = inside
        nll = inside * log_sums - (wanted * logits).sum(dim=-1)
    else:
        weights = target.weights * (target.labels != OUTSIDE_DRAFT_VOCAB)
        mass = torch.ones_like(inside)
        nll = log_sums - logits.gather(-1, target.labels.clamp_min(0)[:, None]).squeeze(-1)
    draft = logits.sub_(log_sums[:, None]).exp_()  # the logits are not needed any more
    difference = draft - wanted
    signs = difference.sign()
    distance = difference.abs_().sum(dim=-1) + (1 - inside).clamp_min(0)

    ce_scale, l1_scale = weights * scales.cross_entropy, target.weights * scales.distance
    mean_sign = (signs * draft).sum(dim=-1)
    # d nll = mass * draft - wanted (or one-hot); d distance = draft * (sign - mean sign).
    slope = signs.mul_(l1_scale[:, None]).add_((ce_scale * mass - l1_scale * mean_sign)[:, None])
    slope.mul_(draft)
    if scales.soft_labels:
        slope.sub_(wanted.mul_(ce_scale[:, None]))
    else:
        slope.scatter_add_(1, target.labels.clamp_min(0)[:, None], -ce_scale[:, None])
    return HeadLosses(
        gradient=slope.to(lm_head.dtype) @ lm_head,
        cross_entropy=LossTerm((nll * weights).sum(), weights.sum()),
        distance=LossTerm((distance * target.weights).sum(), target.weights.sum()),
        acceptance=(1 - 0.5 * distance).clamp(0, 1),
    )
