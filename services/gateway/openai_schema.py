"""Request bodies of the OpenAI API, as far as they are served here.

Types are checked here; ranges are checked where the values are used, the same for REST and gRPC.
Fields that would change the answer but are not implemented are refused by name; unknown ones too,
because a misspelt `max_tokens` must not be ignored. Lists are looked at up to their first wrong item
only: a body can have a million of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic_core import PydanticCustomError

from dspark_core.errors import InvalidRequestError, require
from dspark_core.output_rules import MAX_BIASED_TOKENS, Grammar, LogitAdjustments
from dspark_core.records import MAX_SEED, MAX_TOP_LOGPROBS, SpeculationOptions, Verification
from services.gateway.openai_grammar import ResponseFormatBody, StructuredOutputsBody
from services.gateway.openai_messages import ChatMessageBody
from services.gateway.openai_tools import ToolBody, ToolChoice, refuse_other_shapes, tool_use
from services.gateway.requests import MAX_MESSAGES, Conversation, TextRequest
from services.gateway.tools import ToolUse

_STRICT = ConfigDict(extra="forbid", strict=True)


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _single_prompt(value: object) -> object:
    """Many tools send a list of prompts always; a list of one is that one."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError(
                "prompt_batch",
                "must be one prompt, a string or a list of token ids, not {count}",
                {"count": len(value)},
            )
        value = value[0]
    if isinstance(value, list):
        wrong = next((item for item in value if type(item) is not int), None)
        if wrong is not None:
            raise PydanticCustomError(
                "token_id", "token ids must be integers, not {wrong}", {"wrong": repr(wrong)[:40]}
            )
    return value


class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted and without effect: nothing is padded here."""


class SpeculationBody(BaseModel):
    """Our extension: how this request may be speculated on."""

    model_config = _STRICT

    enabled: bool = True
    verification: Literal["rejection", "coupled"] | None = None
    max_draft_tokens: int | None = None
    lookup: bool = True

    def to_record(self) -> SpeculationOptions:
        return SpeculationOptions(
            enabled=self.enabled,
            verification=Verification(self.verification) if self.verification else None,
            max_draft_tokens=self.max_draft_tokens,
            lookup=self.lookup,
        )


class AnyCompletionBody(BaseModel):
    """What both completion endpoints take."""

    model_config = _STRICT
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Field -> values that ask for nothing."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, FailFast(), BeforeValidator(_one_or_more)] = None
    speculation: SpeculationBody | None = None
    min_tokens_per_second: float | None = None
    """Our extension: the speed floor of this request."""
    ignore_eos: bool | None = None
    """As in other engines: go on past the model's stop tokens."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    """As in other engines."""
    logit_bias: dict[str, float] | None = None
    """By token id, which JSON has as a text."""
    min_tokens: int | None = None
    """As in other engines: no stop token and no stop string before."""
    response_format: ResponseFormatBody | None = None
    structured_outputs: StructuredOutputsBody | None = None
    """As in other engines: more kinds of what the answer has to be."""

    n: int | None = None

    # Accepted and without effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def includes_usage(self) -> bool:
        """In a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def refuse_unsupported(self) -> None:
        """Raises InvalidRequestError naming the first field that asks for what is not there."""
        for name, harmless in self.unsupported.items():
            value = getattr(self, name)
            if value is not None and value not in harmless:
                hint = f"; leave it out or send {harmless[0]!r}" if harmless else ""
                raise InvalidRequestError(f"{name} {value!r:.80} is not supported{hint}", field=name)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options may only be set when stream is true", field="stream_options"
            )

    def _request(
        self,
        request_id: str,
        prompt: Conversation | str | tuple[int, ...],
        max_tokens: int | None,
        top_logprobs: int | None,
    ) -> TextRequest:
        self.refuse_unsupported()
        grammar, field = self._grammar()
        return TextRequest(
            request_id=request_id,
            model=self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=_seed(self.seed),
            stop=tuple(self.stop or ()),
            speculation=self.speculation.to_record() if self.speculation else SpeculationOptions(),
            min_tokens_per_second=self.min_tokens_per_second,
            ignore_eos=bool(self.ignore_eos),
            adjustments=LogitAdjustments(
                logit_bias=_biases(self.logit_bias or {}),
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                min_tokens=self.min_tokens or 0,
            ),
            grammar=grammar,
            grammar_field=field,
            top_logprobs=top_logprobs,
            choices=self.choices,
        )

    def _grammar(self) -> tuple[Grammar | None, str]:
        """And the field that asks for it."""
        asked = _grammar_of(self.response_format, "response_format")
        other = _grammar_of(self.structured_outputs, "structured_outputs")
        if asked is not None and other is not None:
            raise InvalidRequestError(
                "response_format and structured_outputs contradict each other: send one",
                field="structured_outputs",
            )
        return (asked, "response_format") if other is None else (other, "structured_outputs")


def _grammar_of(body: ResponseFormatBody | StructuredOutputsBody | None, field: str) -> Grammar | None:
    try:
        return body.to_grammar() if body else None
    except InvalidRequestError as error:
        if error.field != "grammar":  # the record's name for it
            raise
        raise error.about(field) from None


def _seed(asked: int | None) -> int | None:
    """OpenAI's have 64 bits and a sign, ours no sign: each negative one becomes one of its own."""
    if asked is None:
        return None
    least = -MAX_SEED - 1
    require(least <= asked <= MAX_SEED, "seed", asked, f"in [{least}, {MAX_SEED}]")
    return asked if asked >= 0 else asked - least


def _biases(asked: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    # As their record does, but before each of very many is looked at.
    count = len(asked)
    require(count <= MAX_BIASED_TOKENS, "logit_bias", f"{count} tokens", f"of <= {MAX_BIASED_TOKENS} tokens")
    return tuple((_token_id(name), bias) for name, bias in asked.items())


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 10):
        raise InvalidRequestError(f"logit_bias keys must be token ids, got {name!r:.40}", field="logit_bias")
    return int(name)


class ChatCompletionBody(AnyCompletionBody):
    unsupported = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessageBody], FailFast(), Field(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[ToolBody] | None, FailFast()] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """As in other engines: more variables of the model's chat template."""
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    def to_request(self, request_id: str) -> TextRequest:
        """Raises InvalidRequestError naming the field."""
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
        top_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        messages = (message.to_record(f"messages[{place}]") for place, message in enumerate(self.messages))
        arguments = self.chat_template_kwargs or {}
        prompt = Conversation(messages=tuple(messages), template_arguments=arguments)
        request = self._request(request_id, prompt, next(iter(asked), None), top_logprobs)
        return replace(request, tools=self._tool_use(request.grammar, request.grammar_field))

    def _tool_use(self, grammar: Grammar | None, grammar_field: str) -> ToolUse | None:
        use = tool_use(
            self.tools,
            self.tool_choice,
            parallel=self.parallel_tool_calls is not False,
            eager=bool(self.stream),
        )
        refuse_other_shapes(use, {grammar_field: grammar})
        return use


DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for this endpoint


class CompletionBody(AnyCompletionBody):
    unsupported = {
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: Annotated[str | list[int], BeforeValidator(_single_prompt)]
    logprobs: int | None = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None

    def to_request(self, request_id: str) -> TextRequest:
        """Raises InvalidRequestError naming the field."""
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequestError(
                f"best_of {self.best_of!r:.80} is not supported; leave it out or send {self.choices}, as n",
                field="best_of",
            )
        prompt = self.prompt if isinstance(self.prompt, str) else tuple(self.prompt)
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {self.logprobs}", field="logprobs"
            )
        return self._request(request_id, prompt, max_tokens, self.logprobs)
