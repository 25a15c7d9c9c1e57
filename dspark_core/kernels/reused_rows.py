"""Memory for the results of many calls, handed out again when nothing refers to them any more.

Fresh memory costs a page fault and the zeroing of 4 KB for every 1,024 values: at 49,152 logits a
row that was a twentieth of a step of 8 tokens.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from dspark_core.kernels.memory import huge_zeros

_IDLE_REFERENCES = 3
"""To a buffer: the list's, the loop variable's, and the argument's of `getrefcount`."""


class ReusedRows:
    def __init__(self, *, most_bytes: int = 64 * 2**20, buffers: int = 4) -> None:
        """`most_bytes`: of all buffers together; larger results get memory of their own."""
        self._most_values = most_bytes // buffers // 4
        self._most_buffers = buffers
        self._buffers: list[np.ndarray] = []

    def take(self, rows: int, columns: int) -> Tensor:
        """Uninitialised float32 [rows, columns]."""
        count = rows * columns
        if not 0 < count <= self._most_values:
            return torch.empty((rows, columns))
        for buffer in self._buffers:
            if len(buffer) >= count and sys.getrefcount(buffer) == _IDLE_REFERENCES:
                return _rows_of(buffer, rows, columns)
        # Growing by doubling: a batch that grows row by row must not replace a buffer each time.
        size = min(self._most_values, 1 << (count - 1).bit_length())
        new = huge_zeros(4 * size).view(torch.float32).numpy()
        self._buffers = [new, *self._buffers][: self._most_buffers]
        return _rows_of(new, rows, columns)


def _rows_of(buffer: np.ndarray, rows: int, columns: int) -> Tensor:
    """Refers to the buffer for as long as any tensor made of it lives."""
    return torch.from_numpy(buffer[: rows * columns]).view(rows, columns)
