"""Keeps freed memory in the process, for loops that allocate the same large tensors repeatedly."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""The largest value glibc accepts."""
_KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc reuse the pages of tensors below 32 MiB; by default it maps and faults in each anew.

    False, with no effect, under another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    )
