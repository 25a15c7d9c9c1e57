"""What the gateway needs of whatever generates tokens: a cluster of verifiers, or one in-process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from dspark_core.records import GenerateChunk, GenerateRequest, VerifierDescription


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
