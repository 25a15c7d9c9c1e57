"""Terms that every objective's losses share: sums beside their weights, and block positions' weights.

Sums and weights stay apart so that a batch can be computed in slices, or on several workers, and
still be averaged as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUTSIDE_DRAFT_VOCAB = -1
"""Label of a token that the drafter cannot draw."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    numerator: Tensor  # scalar
    denominator: Tensor  # scalar

    def mean(self) -> Tensor:
        """Zero when nothing was counted."""
        return self.numerator / self.denominator.clamp_min(1e-9)


def position_weights(block_size: int, decay: float) -> Tensor:
    """w_k = exp(-(k-1)/decay), [block]: a token only matters when all before it were accepted."""
    return torch.exp(-torch.arange(block_size, dtype=torch.float32) / decay)
