"""What chat, plain completions and responses have in common: a request body in, a stream of deltas out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from dspark_core.tokenization.tokenizer import Tokenizer
from services.common.streams import closing
from services.gateway.answers import AnswerFactory
from services.gateway.callers.tiers import Caller
from services.gateway.generation import TextGenerator, TimedDelta
from services.gateway.openai.fields import GenerationBody


class UseCase:
    def __init__(self, generator: TextGenerator, answers: AnswerFactory, tokenizer: Tokenizer) -> None:
        self._generator = generator
        self._answers = answers
        self._tokenizer = tokenizer

    def _deltas(
        self, body: GenerationBody, request_id: str, caller: Caller
    ) -> AbstractAsyncContextManager[AsyncIterator[TimedDelta]]:
        """Leaving the context cancels the generation. Raises InvalidRequestError at once, not on entry."""
        requests = [caller.sends(request) for request in body.to_requests(request_id)]
        return closing(self._generator.stream(*requests, account=caller.account))
