"""Result buffers that are reused once nothing refers to them any more.

Fresh memory costs a page fault and zeroing of 4 KB per 1,024 values, which for rows of 49,152 logits was
a twentieth of a step of 8 tokens.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from dspark_core.kernels.memory import huge_zeros

_IDLE_REFERENCES = 3
"""References to an unused buffer: the list, the loop variable, and the argument of `getrefcount`."""


class ReusedRows:
    def __init__(self, *, max_bytes: int = 64 * 2**20, buffers: int = 4) -> None:
        """`max_bytes`: total over all buffers; results too large for a buffer get fresh memory."""
        self._max_values = max_bytes // buffers // 4
        self._max_buffers = buffers
        self._buffers: list[np.ndarray] = []

    def take(self, rows: int, columns: int) -> Tensor:
        """Uninitialised float32 [rows, columns]."""
        count = rows * columns
        if not 0 < count <= self._max_values:
            return torch.empty((rows, columns))
        for buffer in self._buffers:
            if len(buffer) >= count and sys.getrefcount(buffer) == _IDLE_REFERENCES:
                return _rows_of(buffer, rows, columns)
        # Sizes are powers of two, so that a batch growing row by row does not replace a buffer each time.
        size = min(self._max_values, 1 << (count - 1).bit_length())
        new = huge_zeros(4 * size).view(torch.float32).numpy()
        self._buffers = [new, *self._buffers][: self._max_buffers]
        return _rows_of(new, rows, columns)


def _rows_of(buffer: np.ndarray, rows: int, columns: int) -> Tensor:
    """A tensor that keeps the buffer referenced for as long as it or any view of it lives."""
    return torch.from_numpy(buffer[: rows * columns]).view(rows, columns)
