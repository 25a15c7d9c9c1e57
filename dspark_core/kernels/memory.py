"""Zeroed memory on huge pages, where the system offers them.

A step reads every weight once; on 4 KiB pages the processor's translation of addresses becomes a
visible part of the time.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import torch
from torch import Tensor

_CHUNK_BYTES = 32 * 2**20
_ALIGNMENT = 64
_HUGE_PAGE = 2 * 2**20
_MAPPINGS = Path("/proc/self/smaps")


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


def gives_huge_pages() -> bool:
    """Whether this system puts written memory of `huge_zeros` on huge pages now."""
    memory = huge_zeros(4 * _HUGE_PAGE)
    memory.fill_(1)
    return _MAPPINGS.exists() and _huge_bytes(memory.data_ptr()) > 0


def _huge_bytes(address: int) -> int:
    """Of the mapping that holds `address`, as the kernel counts it."""
    inside = False
    for line in _MAPPINGS.read_text(encoding="ascii", errors="replace").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


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
