"""A client's request for a completion, whether it came over REST or gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dspark_core.errors import InvalidRequestError, require
from dspark_core.output_rules import NO_ADJUSTMENTS, Grammar, LogitAdjustments
from dspark_core.records import SpeculationOptions, check_speed_floor
from services.gateway.tools.tools import ToolCall, ToolUse

DEFAULT_TIER_NAME = "default"
DEFAULT_MAX_CHOICES = 16
"""Answers per client request."""
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
"""Even the shortest message takes some time to process."""
MAX_SALT_CHARACTERS = 256
"""Of the client's own part of a cache salt."""
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1024


class ChatRole(Enum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    """The result of a tool call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    role: ChatRole
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that the assistant made in this message."""
    reasoning: str = ""
    """The assistant's thought before this message; most templates leave out those of earlier turns."""
    tool_call_id: str | None = None
    """Id of the call whose result this is."""

    @property
    def plain(self) -> bool:
        """Whether the message has nothing to do with tools."""
        return self.role is not ChatRole.TOOL and not self.tool_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    messages: tuple[ChatMessage, ...]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template."""
    field: str = "messages"
    """The client's field that holds the conversation."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidRequestError(
                f"{self.field} must hold at least one message, got []", field=self.field
            )
        check_message_count(len(self.messages), self.field)
        check_call_count(sum(len(message.tool_calls) for message in self.messages), self.field)


def check_message_count(count: int, name: str = "messages") -> None:
    """Part of `Conversation`'s checks; callers also run it before they build the messages."""
    if count > MAX_MESSAGES:
        raise InvalidRequestError(f"{name} must hold at most {MAX_MESSAGES} items, got {count}", field=name)


def check_call_count(count: int, name: str = "messages") -> None:
    """Of tools, in all messages together. As above."""
    if count > MAX_MESSAGES:
        raise InvalidRequestError(
            f"{name} must hold at most {MAX_MESSAGES} calls of tools, got {count}", field=name
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """Sampling fields left at None take the model's own defaults."""

    request_id: str
    model: str
    prompt: Conversation | str | tuple[int, ...]
    """A conversation, plain text, or token ids."""
    plain_field: str = "prompt"
    """The client's field that holds the prompt, if that is not a conversation."""
    max_tokens: int | None = None
    """None: up to the context limit."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Output ends before the first of these."""
    ignore_eos: bool = False
    """Go on past the model's own stop tokens, up to max_tokens: for load tests with equally long answers."""
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    min_tokens_per_second: float | None = None
    """Speed floor: tokens per second after the first token."""
    floor_field: str | None = "min_tokens_per_second"
    """The client's field that sets the floor; None: set by its tier."""
    floor_promised: bool = False
    """Whether its tier grants floors; otherwise the floor is a wish."""
    tier: str = DEFAULT_TIER_NAME
    """The tier of the client's API key."""
    cache_salt: str | None = None
    """Only requests of the same salt share cached prompts; None: unset."""
    cache_domain: str = ""
    """Set by the client's key: likewise, and a salt divides a domain. Without slashes."""
    adjustments: LogitAdjustments = NO_ADJUSTMENTS
    grammar: Grammar | None = None
    """Constrains the answer; None: it may be anything."""
    grammar_field: str = "grammar"
    """The client's field that sets the grammar."""
    tools: ToolUse | None = None
    """Which tools the answer may call; None: none."""
    choices: int = 1
    """Number of answers to this request."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens to report per position, besides the chosen one; None: no logprobs."""

    def __post_init__(self) -> None:
        check_speed_floor(self.min_tokens_per_second)
        require(self.choices >= 1, "n", self.choices, ">= 1")
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= MAX_SALT_CHARACTERS:
            raise InvalidRequestError(
                f"cache_salt must have 1 to {MAX_SALT_CHARACTERS} characters, got {len(self.cache_salt)}",
                field="cache_salt",
            )
        least = self.adjustments.min_tokens
        if least and self.max_tokens is not None and least > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be <= max_tokens ({self.max_tokens}), got {least}", field="min_tokens"
            )
        if self.prompt in ("", ()):
            field = self.plain_field
            raise InvalidRequestError(f"{field} must not be empty, got {self.prompt!r}", field=field)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", field="stop"
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequestError(
                    f"stop strings must have 1 to {MAX_STOP_CHARACTERS} characters, "
                    f"got {_shortened(text)} with {len(text)}",
                    field="stop",
                )

    @property
    def full_cache_salt(self) -> str:
        """Of domain and salt; no salt leads into another domain."""
        return self.cache_domain if self.cache_salt is None else f"{self.cache_domain}/{self.cache_salt}"

    @property
    def prompt_field(self) -> str:
        """The client's field that holds the prompt."""
        return self.prompt.field if isinstance(self.prompt, Conversation) else self.plain_field


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
