"""Zeroed memory on huge pages, where the system offers them.

A step reads every weight once; on 4 KiB pages the processor's translation of addresses becomes a
visible part of the time.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_CHUNK_BYTES = 32 * 2**20
_ALIGNMENT = 64
_HUGE_PAGE = 2 * 2**20


def huge_zeros(num_bytes: int) -> Tensor:
    """[num_bytes] uint8; physical memory is taken as it is first written."""
    # Private: anonymous memory that is shared, which is what `mmap` gives unless told, belongs to a file
    # system of its own, and that has no huge pages on most machines.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE  # older kernels place a mapping anywhere
    return whole[start : start + num_bytes]


class Arena:
    """Hands out aligned pieces of large blocks; a block lives as long as one of its pieces."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, zeros."""
        if self._used + num_bytes > len(self._block):
            self._block = huge_zeros(max(num_bytes, _CHUNK_BYTES))
            self._used = 0
        piece = self._block[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece
