"""Measures one streamed chat from its chunks and their arrival times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loadtest.sse import StreamError


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


def measure(chunks: Iterable[dict[str, object]], clock: Callable[[], float], started: float) -> ChatSample:
    """Consumes a stream. `started` is a reading of `clock`, in seconds.

    The token count is the server's (`usage`), since a chunk holds all tokens a round committed.
    """
    first = last = None
    usage: dict[str, object] | None = None
    speculation: dict[str, object] | None = None
    for chunk in chunks:
        now = clock()
        if _text(chunk):
            first = now if first is None else first
            last = now
        usage = _mapping(chunk.get("usage")) or usage
        speculation = _mapping(chunk.get("speculation")) or speculation
    if first is None or last is None:
        raise StreamError("stream carried no text")
    if usage is None:
        raise StreamError("stream carried no usage although stream_options.include_usage was set")
    tokens = int(_number(usage, "completion_tokens"))
    return ChatSample(
        first_token_seconds=first - started,
        total_seconds=last - started,
        completion_tokens=tokens,
        tokens_per_second=(tokens - 1) / (last - first) if tokens > 1 and last > first else None,
        accepted_length=_accepted_length(speculation),
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
