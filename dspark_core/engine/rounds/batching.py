"""Continuous batching: decides which requests run, wait, or are preempted when pages run out.

Policy on top of the block manager; no tensors and no clock. First come, first served: the latest arrival is
preempted first and resumes before any new request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dspark_core.engine.caches.block_manager import BlockManager
from dspark_core.engine.sequence import SequenceState
from dspark_core.errors import ConfigError, QueueFullError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    max_running: int = 32
    """Most requests that share target passes."""
    max_waiting: int = 256
    """Most requests in the queue; further ones are refused."""
    max_batch_tokens: int = 512
    """Tokens in one target pass: anchors, drafts and prefill together."""
    prefill_chunk_tokens: int = 256
    """Most prompt tokens in one pass."""
    max_step_seconds: float | None = None
    """While other requests decode, prefill is limited further so that a pass takes at most about this long
    (`PrefillPacer`); None: only by `prefill_chunk_tokens`."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "max_batch_tokens", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.max_step_seconds is not None and not self.max_step_seconds > 0:
            raise ConfigError(f"max_step_seconds must be > 0, got {self.max_step_seconds}")
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"max_running ({self.max_running}) must not exceed max_batch_tokens "
                f"({self.max_batch_tokens}): every running request verifies at least its anchor"
            )


class Batcher:
    def __init__(self, manager: BlockManager, limits: BatchLimits) -> None:
        self._manager = manager
        self.limits = limits
        self.running: list[SequenceState] = []
        self.waiting: deque[SequenceState] = deque()
        self.preemptions = 0

    def enqueue(self, sequence: SequenceState) -> None:
        if len(self.waiting) >= self.limits.max_waiting:
            raise QueueFullError(f"the waiting queue is full ({self.limits.max_waiting} requests)")
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forgets an ended or cancelled sequence and frees its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.release(self._manager)

    def admit(self) -> None:
        """Moves waiting sequences to running in order of arrival, while there is room and pages are
        available.

        They hold all pages that they need for every committed token and one more, so that prefill never runs
        out of pages midway, whatever becomes of those they share pages with.
        """
        while self.waiting and len(self.running) < self.limits.max_running:
            if not self.waiting[0].take_pages(self._manager):
                return
            self.running.append(self.waiting.popleft())

    def skip_filled(self) -> None:
        """What a prompt begins with may have been computed for another one that came with it."""
        for sequence in self.running:
            if not sequence.decoding:
                sequence.skip_filled(self._manager)

    def secure(self, sequence: SequenceState, length: int) -> bool:
        """Allocates pages for positions [0, length), preempting later arrivals if necessary.

        Returns False if only earlier arrivals could be preempted: the sequence then skips this round.
        """
        while not sequence.reserve(self._manager, length):
            latest = max(self.running, key=lambda other: other.order)
            if latest.order <= sequence.order:
                return False
            self._preempt(latest)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        sequence.release(self._manager)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
