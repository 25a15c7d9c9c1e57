"""Confidence of a drafter without a confidence head: the probability of its most likely token.

EAGLE-2 (arXiv 2406.16858) finds that a draft model's own probability is close to its
acceptance rate. The most likely token is used even if another one was drawn, because the verify length
must not depend on the drawn token itself (paper, section 5.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 1 - 1e-6


def own_confidence_logits(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> logit of the largest probability [rows] float32."""
    logits = logits.float()
    probability = (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()
    return torch.logit(probability.clamp(1 - _LARGEST, _LARGEST))
