"""Turns committed tokens into text: detokenises, sets the thought apart, applies stop strings, finds tool
calls, counts tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from dspark_core.records import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    SpeculationStats,
    TokenLogprobs,
)
from dspark_core.tokenization.tokenizer import Tokenizer
from services.gateway.stop_strings import StopStrings
from services.gateway.thoughts.thought_preparation import ThoughtReading
from services.gateway.thoughts.thought_stream import Split
from services.gateway.tools.tool_preparation import CallReading
from services.gateway.tools.tool_stream import CallDelta, Parsed, joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """Up to and including the stop token, or the token that completed a stop string."""
    cached_prompt_tokens: int = 0
    reasoning_tokens: int = 0
    """Those of the completion tokens that are a thought, with its marks."""


@dataclass(frozen=True, slots=True)
class TokenWithLogprobs:
    token_id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text of one round. The last one carries the finish reason and `usage`."""

    text: str
    """Follows the reasoning: no answer returns to its thought."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage
    """Up to and including this delta."""
    stats: SpeculationStats | None = None
    """Up to this delta; None if the backend has not sent any yet."""
    reasoning: str = ""
    """Of the thought before the answer."""
    calls: tuple[CallDelta, ...] = ()
    """Tool calls, each with its position in the text."""
    called: bool = False
    """On the last delta: the answer made tool calls, all of them complete."""
    logprobs: tuple[TokenWithLogprobs, ...] = ()
    """If requested, for the tokens of `reasoning` and `text`: not for stop tokens or stop strings. Those of
    text held back as a possible stop string come with that text."""


class TextAssembler:
    """Assembles one answer; feed it every chunk in order until a delta has a finish reason."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerateRequest,
        stop: tuple[str, ...],
        calls: CallReading | None = None,
        thought: ThoughtReading | None = None,
    ) -> None:
        """calls: how to find tool calls; None: there are none. thought: likewise."""
        shown = [one.shown_token_ids for one in (calls, thought) if one is not None]
        self._detokenizer = tokenizer.detokenizer(shown=frozenset().union(*shown))
        self._calls = calls.stream() if calls else None
        self._thought = thought.stream() if thought else None
        self._stop_token_ids = frozenset(request.stop_token_ids)
        self._stops = StopStrings(stop)
        self._logprobs = _LogprobsOfText()
        self._min_tokens = request.adjustments.min_tokens
        self._prompt_tokens = len(request.prompt_token_ids)
        self._completion_tokens = 0
        self._cached_prompt_tokens = 0
        self._reasoning_tokens = 0
        self._stats: SpeculationStats | None = None

    def add(self, chunk: GenerateChunk) -> TextDelta:
        self._stats = chunk.stats or self._stats
        self._cached_prompt_tokens = max(self._cached_prompt_tokens, chunk.cached_prompt_tokens)
        pieces: list[str] = []
        thoughts: list[str] = []
        found: list[CallDelta] = []
        used = 0
        for token_id, logprobs in zip_longest(chunk.token_ids, chunk.logprobs):
            used += 1
            # Not every checkpoint marks its stop tokens as special; never show them.
            shown = () if token_id in self._stop_token_ids else (token_id,)
            text = self._detokenizer.push(shown)
            split = self._split(text, counted=bool(shown))
            thoughts.append(split.thought)
            certain = self._before_stop(split.answer, self._completion_tokens + used)
            if logprobs is not None and shown:
                self._logprobs.hold(TokenWithLogprobs(token_id, logprobs))
            self._logprobs.advance(len(text), split.aside + len(certain))
            pieces.append(self._without_calls(certain, found, pieces))
            if self._ended:
                break
        self._completion_tokens += used
        finish_reason = FinishReason.STOP if self._ended else chunk.finish_reason
        if finish_reason is not None:
            pieces.append(self._rest(thoughts, found, pieces))
        return TextDelta(
            text="".join(pieces),
            token_ids=chunk.token_ids[:used],
            finish_reason=finish_reason,
            usage=self._usage(),
            reasoning="".join(thoughts),
            stats=self._stats,
            calls=joined(found) if found else (),
            called=finish_reason is not None and self._calls is not None and self._calls.called,
            logprobs=self._logprobs.take(everything=finish_reason is not None and not self._stops.matched),
        )

    @property
    def _ended(self) -> bool:
        """Whether the answer ends here: at a stop string, or because no second call is allowed."""
        return self._stops.matched or (self._calls is not None and self._calls.done)

    def _before_stop(self, text: str, completion_tokens: int) -> str:
        """Text that is certain. A stop string counts if it ends once the answer is as long as asked."""
        return self._stops.push(text, early=completion_tokens <= self._min_tokens)

    def _split(self, text: str, *, counted: bool) -> Split:
        """counted: the text is a token's."""
        if self._thought is None:
            return Split("", text)
        before, split = self._thought.thinking, self._thought.push(text)
        self._reasoning_tokens += counted and (before or self._thought.thinking)
        return split

    def _without_calls(self, text: str, found: list[CallDelta], before: Sequence[str]) -> str:
        """before: content already in this delta."""
        if self._calls is None:
            return text
        return _content(self._calls.push(text), found, before)

    def _rest(self, thoughts: list[str], found: list[CallDelta], before: Sequence[str]) -> str:
        """The text held back so far."""
        if self._ended:
            held = ""
        else:
            last = self._before_stop(self._last_text(thoughts), self._completion_tokens)
            held = last + self._stops.flush()
        text = self._without_calls(held, found, before)
        if self._calls is None:
            return text
        return text + _content(self._calls.flush(), found, [*before, text])

    def _last_text(self, thoughts: list[str]) -> str:
        text = self._detokenizer.flush()
        if self._thought is None:
            return text
        splits = self._thought.push(text), self._thought.flush()
        thoughts += (split.thought for split in splits)
        return "".join(split.answer for split in splits)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            reasoning_tokens=self._reasoning_tokens,
        )


def _content(parsed: Parsed, found: list[CallDelta], before: Sequence[str]) -> str:
    if parsed.calls:
        length = sum(map(len, before))
        found += [replace(call, text_before=length + call.text_before) for call in parsed.calls]
    return parsed.text


class _LogprobsOfText:
    """Releases tokens once the text at which they begin is certain to be part of the answer."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, TokenWithLogprobs]] = deque()
        """Tokens with the offset in the text at which each begins."""
        self._written = self._certain = 0
        """In characters."""

    def hold(self, token: TokenWithLogprobs) -> None:
        """The token begins where the text so far ends."""
        self._held.append((self._written, token))

    def advance(self, written: int, certain: int) -> None:
        """Adds to both counts, in characters."""
        self._written += written
        self._certain += certain

    def take(self, *, everything: bool) -> tuple[TokenWithLogprobs, ...]:
        """Returns the tokens that can be released. everything: all of them, as the answer is complete."""
        taken = []
        while self._held and (everything or self._held[0][0] < self._certain):
            taken.append(self._held.popleft()[1])
        return tuple(taken)
