"""Owners of queued work take turns, however much each of them has to do."""

import threading
from functools import partial
from queue import Queue

from dspark_core.tokenization.turns import TurnQueue


def test_owners_take_turns() -> None:
    turns, begin = TurnQueue("test"), threading.Event()
    done: Queue[str] = Queue()
    turns.submit("alice", begin.wait)
    for owner in ("alice", "alice", "alice", "bob", "bob", "carol"):
        turns.submit(owner, partial(done.put, owner))
    begin.set()
    order = [done.get(timeout=60) for _ in range(6)]
    assert order == ["alice", "bob", "carol", "alice", "bob", "alice"]
