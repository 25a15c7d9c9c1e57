"""Request bodies of OpenAI's chat completions and completions, as far as they are supported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from dspark_core.errors import InvalidRequestError
from dspark_core.records import MAX_TOP_LOGPROBS
from services.gateway.openai.fields import ConversationBody, GenerationBody
from services.gateway.openai.grammar import ResponseFormatBody
from services.gateway.openai.messages import ChatMessageBody
from services.gateway.openai.tool_fields import ToolBody, ToolChoice
from services.gateway.requests import MAX_MESSAGES, MAX_PROMPTS, Conversation, TextRequest
from services.gateway.tools.tools import MAX_TOOLS


def _prompts(value: object) -> object:
    """Wraps a single prompt, a text or token ids, in a list."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("prompt", "must be a text, a list of token ids or a list of either")
    if isinstance(value, str) or not value or not isinstance(value[0], str | list):
        value = [value]
    if len(value) <= MAX_PROMPTS:  # more are refused for their number
        for prompt in value:
            _check_token_ids(prompt)
    return value


def _check_token_ids(prompt: object) -> None:
    if not isinstance(prompt, list):
        return
    wrong = next((item for item in prompt if type(item) is not int), None)
    if wrong is not None:
        raise PydanticCustomError(
            "token_id", "token ids must be integers, not {wrong}", {"wrong": repr(wrong)[:40]}
        )


class AnyCompletionBody(GenerationBody):
    """Fields of both completion endpoints."""

    max_tokens: int | None = None
    response_format: ResponseFormatBody | None = None
    n: int | None = None

    @property
    def format(self) -> ResponseFormatBody | None:
        return self.response_format

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionBody(AnyCompletionBody, ConversationBody):
    unsupported: ClassVar = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }

    messages: Annotated[list[ChatMessageBody], FailFast(), Field(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    tools: Annotated[list[ToolBody] | None, FailFast(), Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    def to_request(self, request_id: str) -> TextRequest:
        asked = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(asked) > 1:
            raise InvalidRequestError(
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} "
                "contradict each other: send one",
                field="max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                f"top_logprobs {self.top_logprobs} needs logprobs to be true", field="top_logprobs"
            )
        messages = (message.to_record(f"messages[{place}]") for place, message in enumerate(self.messages))
        return self._next_turn(
            request_id,
            Conversation(messages=tuple(messages)),
            next(iter(asked), None),
            logprobs=bool(self.logprobs),
            tools=self.tools,
            tool_choice=self.tool_choice,
        )


DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for this endpoint


class CompletionBody(AnyCompletionBody):
    unsupported: ClassVar = {
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[
        list[str | list[int]], FailFast(), Field(max_length=MAX_PROMPTS), BeforeValidator(_prompts)
    ]
    logprobs: int | None = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None

    def to_request(self, request_id: str) -> TextRequest:
        """The request for the first prompt."""
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequestError(
                f"best_of {self.best_of!r:.80} is not supported; leave it out or send {self.choices}, as n",
                field="best_of",
            )
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {self.logprobs}", field="logprobs"
            )
        return self._request(
            request_id, _prompt(self.prompt[0]), max_tokens, self.logprobs, self._field_of(0)
        )

    def to_requests(self, request_id: str) -> Sequence[TextRequest]:
        first = self.to_request(request_id)
        others = enumerate(self.prompt[1:], start=1)
        return [
            first,
            *(
                replace(
                    first,
                    request_id=f"{request_id}.{place}",
                    prompt=_prompt(prompt),
                    plain_field=self._field_of(place),
                )
                for place, prompt in others
            ),
        ]

    def _field_of(self, place: int) -> str:
        return f"prompt[{place}]" if len(self.prompt) > 1 else "prompt"


def _prompt(given: str | list[int]) -> str | tuple[int, ...]:
    return given if isinstance(given, str) else tuple(given)
