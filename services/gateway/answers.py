"""What answers of one gateway have in common: ids, creation times, model name, fingerprint."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from services.gateway.assembly import TokenWithLogprobs
from services.gateway.generation import TimedDelta


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
        """prefix: `chatcmpl` or `cmpl`."""
        return f"{prefix}-{self.new_id()}"

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
    """Changes with the model served and with the software that serves it."""
    digest = hashlib.sha256(f"{software_version()}/{model}".encode()).hexdigest()
    return f"fp_{digest[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A whole answer."""

    text: str
    logprobs: tuple[TokenWithLogprobs, ...]
    last: TimedDelta
    """With the totals."""


async def collect(deltas: AsyncIterator[TimedDelta]) -> Collected:
    texts: list[str] = []
    logprobs: list[TokenWithLogprobs] = []
    last: TimedDelta | None = None
    async for last in deltas:
        texts.append(last.delta.text)
        logprobs.extend(last.delta.logprobs)
    if last is None:
        raise AssertionError("a stream of text has at least one delta")
    return Collected(text="".join(texts), logprobs=tuple(logprobs), last=last)
