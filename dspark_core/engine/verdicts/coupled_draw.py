"""Coupled draws for target rows, with native kernels if available."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.algorithms import coupling
from dspark_core.algorithms.sampling import SamplingRows, target_weight_blocks
from dspark_core.kernels import coupling as native
from dspark_core.kernels.library import kernels_for
from dspark_core.records import SamplingParams


def sample_coupled(
    logits: Tensor, params: Sequence[SamplingParams], seeds: Tensor, positions: Tensor
) -> Tensor:
    """logits [rows, vocab], params of each row; seeds, positions [rows] int64 -> token ids [rows] int64.

    Both implementations draw the same tokens, unless two candidates' race times, or a token's weight and the
    truncation threshold, differ only by the last bit of an exponential or logarithm.
    """
    kernels = kernels_for(logits)
    if kernels is not None:
        return native.sample_coupled(kernels, logits, params, seeds, positions)
    blocks = target_weight_blocks(logits, SamplingRows.from_params(params, device=logits.device))
    return torch.cat([coupling.sample_coupled(weights, seeds[s], positions[s]) for s, weights in blocks])
