"""What a gateway's answers share (ids, creation time, model, fingerprint), and collecting whole answers."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from services.gateway.assembly import TokenWithLogprobs
from services.gateway.generation import TimedDelta
from services.gateway.tools.tool_stream import CallDelta


class AnswerHead(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFactory:
    model: str
    fingerprint: str
    started: int = field(default_factory=lambda: int(time.time()))
    clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex

    def request_id(self, prefix: str) -> str:
        """prefix: each of OpenAI's APIs has its own."""
        return f"{prefix}{self.new_id()}"

    def call_id(self) -> str:
        return f"call_{self.new_id()}"

    def head(self, request_id: str) -> AnswerHead:
        return AnswerHead(
            id=request_id,
            created=int(self.clock()),
            model=self.model,
            system_fingerprint=self.fingerprint,
        )


def software_version() -> str:
    try:
        return version("dspark")
    except PackageNotFoundError:  # run from a source tree
        return "source"


def fingerprint_of(model: str) -> str:
    """Changes with the served model and the version of the software."""
    digest = hashlib.sha256(f"{software_version()}/{model}".encode()).hexdigest()
    return f"fp_{digest[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A complete answer."""

    text: str
    reasoning: str
    calls: tuple[CallDelta, ...]
    logprobs: tuple[TokenWithLogprobs, ...]
    last: TimedDelta
    """Carries the totals."""


async def collect(deltas: AsyncIterator[TimedDelta]) -> list[Collected]:
    """One complete answer per choice, in order."""
    choices: dict[int, list[TimedDelta]] = {}
    async for timed in deltas:
        choices.setdefault(timed.choice, []).append(timed)
    return [_collected(choices[index]) for index in sorted(choices)]


def _collected(parts: Sequence[TimedDelta]) -> Collected:
    deltas = [timed.delta for timed in parts]
    return Collected(
        text="".join(delta.text for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        calls=tuple(call for delta in deltas for call in delta.calls),
        logprobs=tuple(token for delta in deltas for token in delta.logprobs),
        last=parts[-1],
    )
