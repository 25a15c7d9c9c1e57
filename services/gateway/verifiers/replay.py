"""The request to send to the next verifier when one is lost in the middle of a generation.

It holds the prompt plus the committed tokens, at the same absolute positions: greedy and coupled requests
continue with exactly the tokens they would have had, others with tokens of the same distribution. This holds
for a verifier of the same weights only.
"""

from __future__ import annotations

from dataclasses import replace

from dspark_core.records import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    SpeculationStats,
    Verification,
)


class Replay:
    """One request's progress across all verifiers that worked on it."""

    def __init__(self, request: GenerateRequest, *, seed: int) -> None:
        """seed: for a coupled request without one, so that every verifier draws the same noise."""
        if request.verification is Verification.COUPLED and request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        self._request = request
        self._committed: list[int] = []
        self._cached_prompt_tokens: int | None = None
        self._earlier: SpeculationStats | None = None
        """Total over the previous verifiers; None on the first."""
        self._current: SpeculationStats | None = None
        self._finished = False
        self._weights = ""
        self._attempts = 0

    @property
    def weights(self) -> str:
        """The weights that the request must continue on. Empty while it has no tokens: any will do."""
        return self._weights if self._committed else ""

    @property
    def finished(self) -> bool:
        """Whether a verifier has sent the finish reason."""
        return self._finished

    def request(self) -> GenerateRequest:
        """The request for the next verifier, whose statistics start at zero."""
        self._earlier, self._current = self._total(), None
        attempt, self._attempts = self._attempts, self._attempts + 1
        if not self._committed:
            return replace(self._request, attempt=attempt) if attempt else self._request
        limit = self._request.max_tokens
        return replace(
            self._request,
            prompt_token_ids=(*self._request.prompt_token_ids, *self._committed),
            max_tokens=None if limit is None else limit - len(self._committed),
            generated_tokens=len(self._committed),
            attempt=attempt,
            weights=self._weights,
        )

    def add(self, chunk: GenerateChunk) -> GenerateChunk:
        """The chunk as the caller should see it, including the statistics of earlier verifiers."""
        # Before the first token a verifier with other weights may have been tried.
        self._weights = chunk.weights or self._weights
        self._committed.extend(chunk.token_ids)
        self._finished = chunk.finish_reason is not None
        if self._cached_prompt_tokens is None:
            # Only the first verifier's count is right: later prompts hold tokens the caller did not send.
            self._cached_prompt_tokens = chunk.cached_prompt_tokens
        self._current = chunk.stats or self._current
        cached = self._cached_prompt_tokens
        if self._earlier is None and chunk.stats is not None and chunk.cached_prompt_tokens == cached:
            return chunk  # the common case, once per token: nothing to change
        stats = None if self._current is None else self._total()
        return replace(chunk, stats=stats, cached_prompt_tokens=cached)

    def end(self) -> GenerateChunk | None:
        """The last chunk if only that was lost; None while there are tokens left to generate."""
        reason = None
        if self._committed and self._committed[-1] in self._request.stop_token_ids:
            reason = FinishReason.STOP
        elif len(self._committed) == self._request.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            return None
        return GenerateChunk(
            token_ids=(),
            finish_reason=reason,
            stats=self._total() or SpeculationStats(),
            cached_prompt_tokens=self._cached_prompt_tokens or 0,
        )

    def _total(self) -> SpeculationStats | None:
        if self._earlier is None or self._current is None:
            return self._current or self._earlier
        return self._earlier.plus(self._current)
