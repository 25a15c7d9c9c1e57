"""Fields that request bodies of all OpenAI APIs served here have in common, and how they are checked.

Types are checked here; ranges are checked where the values are used, the same for REST and gRPC.
Fields that would change the answer but are not implemented are refused by name, and so are unknown ones:
a misspelt `max_tokens` must not be ignored. Lists are counted before their items are checked, and
checked only up to the first wrong one, because a body can have a million of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast

from dspark_core.errors import InvalidRequestError, require
from dspark_core.output_rules import Grammar, LogitAdjustments, check_bias_count
from dspark_core.records import MAX_SEED, SpeculationOptions, Verification
from services.gateway.openai.grammar import FormatBody, StructuredOutputsBody
from services.gateway.openai.tool_fields import ChoiceOfTools, DeclaredTool, grammar_beside, tool_use
from services.gateway.requests import Conversation, TextRequest

STRICT = ConfigDict(extra="forbid", strict=True)


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _few_biases(value: object) -> object:
    if isinstance(value, dict):
        check_bias_count(len(value))
    return value


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted, but without effect: nothing is padded here."""


class SpeculationBody(BaseModel):
    """Our extension: options for speculative decoding of this request."""

    model_config = STRICT

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


class GenerationBody(BaseModel):
    """Fields of all endpoints that generate."""

    model_config = STRICT
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Unsupported fields, each with the values that are harmless."""
    format_field: ClassVar[str] = "response_format"
    """The field that `format` comes from."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, FailFast(), BeforeValidator(_one_or_more)] = None
    speculation: SpeculationBody | None = None
    min_tokens_per_second: float | None = None
    """Our extension: the speed floor of this request."""
    cache_salt: str | None = None
    """As in other engines: only requests of the same salt share cached prompts."""
    ignore_eos: bool | None = None
    """As in other engines: go on past the model's stop tokens."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    """As in other engines."""
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few_biases)] = None
    """By token id (a string in JSON)."""
    min_tokens: int | None = None
    """As in other engines: no stop token or stop string before this many tokens."""
    structured_outputs: StructuredOutputsBody | None = None
    """As in other engines: more kinds of constraints on the answer."""

    # Accepted, but without effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @abstractmethod
    def to_request(self, request_id: str) -> TextRequest:
        """Raises InvalidRequestError naming the field."""

    def to_requests(self, request_id: str) -> Sequence[TextRequest]:
        """One request per prompt, where there may be several; the first has this id."""
        return [self.to_request(request_id)]

    @property
    @abstractmethod
    def format(self) -> FormatBody | None:
        """The form of the answer, in OpenAI's own field for it; None: unset."""

    @property
    def choices(self) -> int:
        return 1

    def refuse_unsupported(self) -> None:
        """Raises InvalidRequestError naming the first field that asks for something unsupported."""
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
        plain_field: str = "prompt",
    ) -> TextRequest:
        self.refuse_unsupported()
        grammar, field = self._grammar()
        return TextRequest(
            request_id=request_id,
            model=self.model,
            prompt=prompt,
            plain_field=plain_field,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=_seed(self.seed),
            stop=tuple(self.stop or ()),
            speculation=self.speculation.to_record() if self.speculation else SpeculationOptions(),
            min_tokens_per_second=self.min_tokens_per_second,
            cache_salt=self.cache_salt,
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
        """The grammar of the answer, and the field that asks for it."""
        asked = _grammar_of(self.format, self.format_field)
        other = _grammar_of(self.structured_outputs, "structured_outputs")
        if asked is not None and other is not None:
            raise InvalidRequestError(
                f"{self.format_field} and structured_outputs contradict each other: send one",
                field="structured_outputs",
            )
        return (asked, self.format_field) if other is None else (other, "structured_outputs")


class ConversationBody(GenerationBody):
    """Fields of the endpoints that continue a conversation."""

    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """As in other engines: extra variables for the chat template."""

    def _next_turn(
        self,
        request_id: str,
        conversation: Conversation,
        max_tokens: int | None,
        *,
        logprobs: bool,
        tools: Sequence[DeclaredTool] | None,
        tool_choice: ChoiceOfTools | None,
    ) -> TextRequest:
        conversation = replace(conversation, template_arguments=self.chat_template_kwargs or {})
        top_logprobs = (self.top_logprobs or 0) if logprobs else None
        request = self._request(request_id, conversation, max_tokens, top_logprobs)
        use = tool_use(
            tools, tool_choice, parallel=self.parallel_tool_calls is not False, eager=bool(self.stream)
        )
        grammar = grammar_beside(use, request.grammar, request.grammar_field, allowed=self.format_field)
        return replace(request, grammar=grammar, tools=use)


def _grammar_of(body: FormatBody | StructuredOutputsBody | None, field: str) -> Grammar | None:
    try:
        return body.to_grammar() if body else None
    except InvalidRequestError as error:
        if error.field != "grammar":  # the name used by `Grammar` itself
            raise
        raise error.about(field) from None


def _seed(asked: int | None) -> int | None:
    """OpenAI's seeds are signed 64-bit integers, ours are not negative: maps negative ones to distinct values
    in [0, MAX_SEED], which positive seeds use as well."""
    if asked is None:
        return None
    least = -MAX_SEED - 1
    require(least <= asked <= MAX_SEED, "seed", asked, f"in [{least}, {MAX_SEED}]")
    return asked if asked >= 0 else asked - least


def _biases(asked: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    return tuple((_token_id(name), bias) for name, bias in asked.items())


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 10):
        raise InvalidRequestError(f"logit_bias keys must be token ids, got {name!r:.40}", field="logit_bias")
    return int(name)
