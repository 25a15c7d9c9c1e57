"""Keeps freed memory in the process, for loops that allocate the same large tensors again and again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc accepts no more."""
_KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """With glibc, tensors below 32 MiB reuse pages; by default each is mapped, and faulted in, anew.

    False where the C library is another one: nothing changes then.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    )
