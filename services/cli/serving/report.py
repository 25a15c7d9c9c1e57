"""Speed and acceptance of one answer, in one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.cli.serving.client import ChatPiece


@dataclass(slots=True)
class AnswerMeter:
    """Is given every piece of an answer; `line` then summarizes it."""

    clock: Callable[[], float] = time.perf_counter
    started: float = field(init=False)
    first_text: float | None = None
    ended: float = field(init=False)
    speculation: dict[str, Any] = field(default_factory=dict)
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self.started = self.ended = self.clock()

    def add(self, piece: ChatPiece) -> None:
        now = self.clock()
        if piece.text or piece.reasoning:
            self.first_text = self.first_text or now
            self.ended = now
        if piece.speculation:
            self.speculation = piece.speculation
        if piece.usage:
            self.completion_tokens = int(piece.usage["completion_tokens"])

    def line(self) -> str:
        seconds = max(self.ended - self.started, 1e-9)
        first = (self.first_text or self.ended) - self.started
        parts = [
            f"{self.completion_tokens} tokens in {seconds:.2f} s",
            f"{self.completion_tokens / seconds:.1f} tokens/s",
            f"first after {first:.2f} s",
        ]
        if self.speculation.get("drafted_tokens"):
            parts.append(f"accepted length {self.speculation['accepted_length']:.2f}")
            parts.append(f"{100 * self.speculation['acceptance_rate']:.0f} % of verified drafts accepted")
        else:
            parts.append("no speculation")
        return ", ".join(parts)
