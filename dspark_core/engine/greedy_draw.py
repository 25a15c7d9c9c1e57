"""Greedy choices of target rows by the fastest way to be had."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.algorithms import sampling
from dspark_core.kernels.greedy import most_likely
from dspark_core.kernels.library import native_kernels


def greedy_tokens(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> most likely token ids [rows] int64, the lowest id among equals."""
    native = logits.device.type == "cpu" and logits.dtype is torch.float32 and len(logits) > 0
    kernels = native_kernels() if native else None
    return sampling.greedy_tokens(logits) if kernels is None else most_likely(kernels, logits)
