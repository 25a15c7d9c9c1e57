"""One thread for the work of several owners, who take turns: whoever has much to do waits for itself only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class TurnQueue:
    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], object]]] = {}
        """By owner; the first has the next turn."""

    def submit(self, owner: str, task: Callable[[], object]) -> None:
        with self._lock:
            self._waiting.setdefault(owner, deque()).append(task)
        self._thread.submit(self._run_next)

    def _run_next(self) -> None:
        with self._lock:
            owner = next(iter(self._waiting))
            tasks = self._waiting.pop(owner)
            task = tasks.popleft()
            if tasks:
                self._waiting[owner] = tasks
        task()
