"""Measures one streamed chat from its chunks and their arrival times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loadtest.sse import StreamError

ROUND_TOKENS = 16
"""More than a round of speculative decoding usually commits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSample:
    """What a user saw of one finished chat."""

    first_token_seconds: float
    """From sending the request to the first piece of text."""
    total_seconds: float
    completion_tokens: int
    tokens_per_second: float | None
    """Reading speed: tokens after the first divided by the time after it; None below 2 tokens."""
    accepted_length: float | None
    """Mean tokens committed per verification round; None: the server did not speculate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedChat:
    """What a user had seen of a chat that the end of the run cut off."""

    waited_seconds: float
    """From sending the request to the end of the run."""
    first_token_seconds: float | None
    """None: no text had come."""
    tokens_at_most: int
    """More tokens than this had not been computed: the server tells their number only at the end."""

    @property
    def tokens_per_second_at_most(self) -> float:
        return self.tokens_at_most / max(self.waited_seconds - (self.first_token_seconds or 0.0), 1e-9)


class ChatMeter:
    def __init__(self, clock: Callable[[], float], started: float) -> None:
        """`started` is a reading of `clock`, in seconds."""
        self._clock = clock
        self._started = started
        self._first: float | None = None
        self._last = started
        self._text_bytes = 0

    def measure(self, chunks: Iterable[dict[str, object]]) -> ChatSample:
        """Consumes a stream.

        The token count is the server's (`usage`), since a chunk holds all tokens a round committed.
        """
        usage: dict[str, object] | None = None
        speculation: dict[str, object] | None = None
        for chunk in chunks:
            if text := _text(chunk):
                self._last = self._clock()
                self._first = self._last if self._first is None else self._first
                self._text_bytes += len(text.encode())
            usage = _mapping(chunk.get("usage")) or usage
            speculation = _mapping(chunk.get("speculation")) or speculation
        if self._first is None:
            raise StreamError("stream carried no text")
        if usage is None:
            raise StreamError("stream carried no usage although stream_options.include_usage was set")
        tokens, reading = int(_number(usage, "completion_tokens")), self._last - self._first
        return ChatSample(
            first_token_seconds=self._first - self._started,
            total_seconds=self._last - self._started,
            completion_tokens=tokens,
            tokens_per_second=(tokens - 1) / reading if tokens > 1 and reading > 0 else None,
            accepted_length=_accepted_length(speculation),
        )

    def unfinished(self, max_tokens: int) -> UnfinishedChat:
        """For a chat cut off now. A token is at least a byte of text, and a round may be under way."""
        begun = self._first is not None
        return UnfinishedChat(
            waited_seconds=self._clock() - self._started,
            first_token_seconds=None if self._first is None else self._first - self._started,
            tokens_at_most=min(max_tokens, self._text_bytes + ROUND_TOKENS) if begun else max_tokens,
        )


def _text(chunk: dict[str, object]) -> str:
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    delta = _mapping(choices[0].get("delta")) or {}
    # A thinking model's thought is text too: users see it come, and its tokens count.
    return str(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or "")


def _accepted_length(speculation: dict[str, object] | None) -> float | None:
    if speculation is None or not _number(speculation, "drafted_tokens"):
        return None
    return _number(speculation, "accepted_length")


def _mapping(value: object) -> dict[str, object] | None:
    return value if isinstance(value, dict) else None


def _number(fields: dict[str, object], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StreamError(f"{name} must be a number, got {value!r}")
    return float(value)
