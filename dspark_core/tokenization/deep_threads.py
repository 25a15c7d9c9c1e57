"""Threads for what recurses as deep as its input says: native code that overflows ends the process."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, ThreadPoolExecutor

STACK_BYTES = 512 * 2**20
"""Address space, not memory: pages are taken as they are used."""

_starting = threading.Lock()


def deep_thread(name: str) -> Executor:
    """One thread with a large stack, which ends with the executor."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    with _starting:  # the size is the process's: whoever else starts a thread in between gets it, too
        usual = threading.stack_size(STACK_BYTES)
        try:
            executor.submit(int).result()  # the thread starts with its first task
        finally:
            threading.stack_size(usual)
    return executor
