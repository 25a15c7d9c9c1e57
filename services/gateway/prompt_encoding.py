"""Tokenizes prompts in threads, off the event loop: long ones one at a time, so short ones need not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.tokenizer import Tokenizer
from services.gateway.requests import Conversation, TextRequest
from services.gateway.served_model import too_long
from services.gateway.thread_work import ThreadWork
from services.gateway.tools.tool_preparation import ToolPreparer
from services.gateway.tools.tools import ToolUse

_T = TypeVar("_T")

LONG_CHARACTERS = 65_536
"""Longer texts take noticeable time and memory to encode: tens of milliseconds and more."""


_END_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    token_ids: tuple[int, ...]
    end: str | None = None
    """The last characters of what the chat template wrote; None: the prompt is no conversation."""


class PromptEncoder:
    """Long texts share one thread, so that clients sending many of them, or disconnecting, cannot take up all
    cores and memory."""

    def __init__(self, tokenizer: Tokenizer, tools: ToolPreparer) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._fewest = tokenizer.fewest_tokens()
        self._long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long-prompts")

    async def encode(self, request: TextRequest, limit: int, work: ThreadWork) -> EncodedPrompt:
        """Raises ContextLengthError for a text that cannot fit, without encoding it, and InvalidRequestError
        if the chat template refuses the conversation."""
        prompt, field = request.prompt, request.prompt_field
        if isinstance(prompt, str):
            return EncodedPrompt(await self._encode(prompt, field, limit, work, add_special_tokens=True))
        if isinstance(prompt, Conversation):
            size = sum(len(message.content) + len(message.reasoning) for message in prompt.messages)
            text, token_ids = await self._run(
                size, work, lambda: self._rendered(prompt, request.tools, limit)
            )
            if token_ids is None:
                # The template writes the BOS token itself if the model needs one.
                token_ids = await self._encode(text, field, limit, work, add_special_tokens=False)
            return EncodedPrompt(token_ids, text[-_END_CHARACTERS:])
        return EncodedPrompt(prompt)

    def _rendered(
        self, conversation: Conversation, tools: ToolUse | None, limit: int
    ) -> tuple[str, tuple[int, ...] | None]:
        """The text, and its tokens if it is short: most conversations then need one trip to a thread only."""
        try:
            text = self._tools.render(conversation, tools)
        except InvalidRequestError as error:
            if error.field != "messages":  # the template's name for it
                raise
            raise error.about(conversation.field) from None
        if len(text) > LONG_CHARACTERS:
            return text, None
        self._refuse_too_long(text, conversation.field, limit)
        return text, self._tokenizer.encode(text, add_special_tokens=False)

    async def _encode(
        self, text: str, field: str, limit: int, work: ThreadWork, *, add_special_tokens: bool
    ) -> tuple[int, ...]:
        self._refuse_too_long(text, field, limit)
        return await self._run(
            len(text), work, lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def _run(self, characters: int, work: ThreadWork, task: Callable[[], _T]) -> _T:
        if characters <= LONG_CHARACTERS:
            return await asyncio.to_thread(task)
        return await work.wait(self._long.submit(task))

    def _refuse_too_long(self, text: str, field: str, limit: int) -> None:
        # A character has at most 4 bytes, so short texts certainly fit.
        if self._fewest is None or 4 * len(text) < limit * self._fewest.longest_token_bytes:
            return
        fewest = self._fewest.of(text)
        if fewest >= limit:
            raise too_long(field, f"at least {fewest}", limit)
