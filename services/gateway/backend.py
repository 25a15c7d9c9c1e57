"""What the gateway needs of whatever generates tokens: a cluster of verifiers, or one in-process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from dspark_core.records import GenerateChunk, GenerateRequest, VerifierDescription

_T = TypeVar("_T")


class GenerationBackend(Protocol):
    """Raises errors of `dspark_core.errors` only."""

    async def describe(self) -> VerifierDescription:
        """What is served. Asked for every request, so it must be cheap once it is known.

        Raises:
            UnavailableError: nothing could be asked yet.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """One completion; the last chunk carries `finish_reason`.

        Every chunk should carry the `stats` so far: a stop string ends a request before its last
        chunk. Closing the iterator cancels the request wherever it runs.
        """
        ...


@asynccontextmanager
async def closing(stream: AsyncIterator[_T]) -> AsyncIterator[AsyncIterator[_T]]:
    """Closes an async iterator on exit when it can be closed: generators can, and need it.

    Without this a generator left early lives on until it is collected.
    """
    try:
        yield stream
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()
