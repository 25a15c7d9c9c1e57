"""Parts shared by all objectives' losses: weighted sums with their denominators, and position weights.

Numerators and denominators stay separate so that slices of a batch, or several workers, can be
averaged as one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUTSIDE_DRAFT_VOCAB = -1
"""Label of a token outside the draft vocabulary."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    numerator: Tensor  # scalar
    denominator: Tensor  # scalar

    def mean(self) -> Tensor:
        """Zero when the denominator is zero."""
        return self.numerator / self.denominator.clamp_min(1e-9)


def position_weights(block_size: int, decay: float) -> Tensor:
    """w_k = exp(-(k-1)/decay), [block]: a draft token only matters if all tokens before it were accepted."""
    return torch.exp(-torch.arange(block_size, dtype=torch.float32) / decay)
