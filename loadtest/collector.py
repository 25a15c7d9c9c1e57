"""Collects the outcomes of a run, in this process or from locust's worker processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loadtest.meter import ChatSample, UnfinishedChat
from loadtest.sla import Outcomes


class Collector:
    """Needs no lock: locust's users are greenlets of one thread, and these methods never yield."""

    def __init__(self, limit: int = 0) -> None:
        """`limit`: number of chats that may be started; 0: no limit."""
        self._limit = limit
        self._started = 0
        self._samples: list[ChatSample] = []
        self._unfinished: list[UnfinishedChat] = []
        self._failed = 0
        self._refused = 0
        self._ended = False

    def may_start(self) -> bool:
        """Claim a chat; False once the limit is reached."""
        if self._limit and self._started >= self._limit:
            return False
        self._started += 1
        return True

    @property
    def finished(self) -> bool:
        """All chats up to the limit have ended."""
        return bool(self._limit) and len(self._samples) + self._failed + self._refused >= self._limit

    def add(self, sample: ChatSample) -> None:
        self._samples.append(sample)

    def add_unfinished(self, chat: UnfinishedChat) -> None:
        self._unfinished.append(chat)

    def add_failure(self) -> None:
        self._failed += 1

    def add_refusal(self) -> None:
        self._refused += 1

    def end(self) -> bool:
        """True for the first caller only."""
        first, self._ended = not self._ended, True
        return first

    def outcomes(self) -> Outcomes:
        return Outcomes(
            samples=tuple(self._samples),
            unfinished=tuple(self._unfinished),
            failed=self._failed,
            refused=self._refused,
        )

    def drain(self) -> dict[str, Any]:
        """Outcomes since the last call, as plain values that locust can send to its master."""
        sent = {
            "samples": [asdict(sample) for sample in self._samples],
            "unfinished": [asdict(chat) for chat in self._unfinished],
            "failed": self._failed,
            "refused": self._refused,
        }
        self._samples, self._unfinished, self._failed, self._refused = [], [], 0, 0
        return sent

    def merge(self, sent: dict[str, Any]) -> None:
        self._samples += [ChatSample(**sample) for sample in sent["samples"]]
        self._unfinished += [UnfinishedChat(**chat) for chat in sent["unfinished"]]
        self._failed += sent["failed"]
        self._refused += sent["refused"]
