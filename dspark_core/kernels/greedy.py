"""The most likely token of each row, several times as fast as PyTorch's argmax."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.kernels.library import Kernels


def most_likely(kernels: Kernels, logits: Tensor) -> Tensor:
    """logits [rows, vocab] float32 on the CPU -> token ids [rows] int64, the lowest id on ties."""
    if logits.dtype is not torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    rows, vocab = logits.shape
    logits = logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64)
    kernels.functions.dspark_most_likely(
        logits.data_ptr(), rows, vocab, out.data_ptr(), torch.get_num_threads()
    )
    return out
