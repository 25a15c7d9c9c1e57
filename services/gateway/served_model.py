"""The one model a gateway serves: its name and its context limit."""

from __future__ import annotations

import dataclasses

from dspark_core.errors import ContextLengthError, UnavailableError, UnknownModelError
from dspark_core.records import VerifierDescription
from services.gateway.verifiers.backend import GenerationBackend


class ServedModel:
    def __init__(self, name: str, backend: GenerationBackend, max_context_tokens: int | None = None) -> None:
        """max_context_tokens: lowers the backend's limit."""
        self.name = name
        self._backend = backend
        self._max_context_tokens = max_context_tokens

    def check_name(self, asked: str) -> None:
        """Raises UnknownModelError."""
        if asked != self.name:
            raise UnknownModelError(
                f"the model {asked!r} does not exist here, only {self.name!r}", field="model"
            )

    async def describe(self) -> VerifierDescription:
        """The backend's description with this gateway's context limit. Raises UnavailableError while no
        verifier is known."""
        description = await self._backend.describe()
        limit = min(
            description.max_context_tokens, self._max_context_tokens or description.max_context_tokens
        )
        return dataclasses.replace(description, max_context_tokens=limit)

    async def known_limit(self) -> int | None:
        """The context limit; while no verifier is known the configured one, if any."""
        try:
            return (await self.describe()).max_context_tokens
        except UnavailableError:
            return self._max_context_tokens


def too_long(field: str, tokens: str, limit: int) -> ContextLengthError:
    """tokens: how many, such as `at least 5000` if that is all that is known.

    Clients such as LiteLLM and LangChain recognise the error by OpenAI's and Anthropic's words for it: `this
    model's maximum context length is`, `prompt is too long`.
    """
    return ContextLengthError(
        f"{field} has {tokens} tokens: the prompt is too long, as this model's maximum context length is "
        f"{limit} tokens and must hold at least one more",
        field=field,
        limit=limit,
    )
