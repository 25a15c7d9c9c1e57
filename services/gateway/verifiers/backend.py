"""The interface of whatever generates tokens: a cluster of verifiers, or one in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from dspark_core.records import GenerateChunk, GenerateRequest, VerifierDescription


class GenerationBackend(Protocol):
    """Raises errors of `dspark_core.errors` only."""

    async def describe(self) -> VerifierDescription:
        """Describes what is served. Called for every request, so the answer should be cached.

        Raises:
            UnavailableError: no verifier has been reached yet.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """Generates one completion; the last chunk carries `finish_reason`.

        Every chunk should carry the `stats` so far, because a stop string can end a request before its
        last chunk. Closing the iterator cancels the request wherever it runs.
        """
        ...
