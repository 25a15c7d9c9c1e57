"""Greedy choices for target rows, with native kernels if available."""

from __future__ import annotations

from torch import Tensor

from dspark_core.algorithms import sampling
from dspark_core.kernels.greedy import most_likely
from dspark_core.kernels.library import kernels_for


def greedy_tokens(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> most likely token ids [rows] int64; ties go to the lowest id."""
    kernels = kernels_for(logits)
    return sampling.greedy_tokens(logits) if kernels is None else most_likely(kernels, logits)
