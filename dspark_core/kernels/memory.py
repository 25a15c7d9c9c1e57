"""Zeroed memory on huge pages, if the system offers them.

A step reads every weight once; with 4 KiB pages, address translation takes a noticeable share
of its time.
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
    """[num_bytes] uint8; physical memory is allocated on first write."""
    # Private, because shared anonymous memory, the default of `mmap`, is backed by shmem, for which most
    # machines have huge pages disabled.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE  # older Linux kernels do not align mappings
    return whole[start : start + num_bytes]


def gives_huge_pages() -> bool:
    """Whether the system currently backs memory from `huge_zeros` with huge pages."""
    memory = huge_zeros(4 * _HUGE_PAGE)
    memory.fill_(1)
    return _MAPPINGS.exists() and _huge_bytes(memory.data_ptr()) > 0


def _huge_bytes(address: int) -> int:
    """Huge-page bytes of the mapping that contains `address`, as counted by the Linux kernel."""
    inside = False
    for line in _MAPPINGS.read_text(encoding="ascii", errors="replace").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


class Arena:
    """Hands out aligned pieces of large blocks; a block lives as long as any of its pieces."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, zeroed."""
        if self._used + num_bytes > len(self._block):
            self._block = huge_zeros(max(num_bytes, _CHUNK_BYTES))
            self._used = 0
        piece = self._block[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece
