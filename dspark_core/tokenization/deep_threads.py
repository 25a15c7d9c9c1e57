"""Threads with a large stack, for native code that recurses as deep as its input: an overflow is fatal."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, ThreadPoolExecutor

STACK_BYTES = 512 * 2**20
"""Address space rather than memory: pages are allocated on first use."""

_starting = threading.Lock()


def deep_thread(name: str) -> Executor:
    """An executor with one thread that has a large stack."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    with _starting:  # the setting is process-wide: threads started by others meanwhile get it too
        usual = threading.stack_size(STACK_BYTES)
        try:
            executor.submit(int).result()  # the thread starts with its first task
        finally:
            threading.stack_size(usual)
    return executor
