"""Log-probabilities in the two formats of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from pydantic import BaseModel

from dspark_core.tokenization.tokenizer import Tokenizer
from services.gateway.assembly import TokenWithLogprobs


class _Entry(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TopLogprobBody(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobBody(TopLogprobBody):
    top_logprobs: list[TopLogprobBody]


class ChatLogprobsBody(BaseModel):
    content: list[TokenLogprobBody]
    refusal: None = None


class CompletionLogprobsBody(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each token begins in the answer's text, in characters; parts of a character have its offset."""


class LogprobsWriter:
    """Writes the log-probabilities of one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()

    def chat(self, tokens: Sequence[TokenWithLogprobs]) -> ChatLogprobsBody:
        return ChatLogprobsBody(
            content=[
                TokenLogprobBody(
                    **self._entry(token.token_id, token.logprobs.logprob),
                    top_logprobs=[TopLogprobBody(**self._entry(*other)) for other in token.logprobs.top],
                )
                for token in tokens
            ]
        )

    def completion(self, tokens: Sequence[TokenWithLogprobs]) -> CompletionLogprobsBody:
        offsets = []
        for token in tokens:
            offsets.append(self._detokenizer.place(token.token_id))
            self._detokenizer.push((token.token_id,))
        return CompletionLogprobsBody(
            tokens=[self._text(token.token_id) for token in tokens],
            token_logprobs=[token.logprobs.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=offsets,
        )

    def _top(self, token: TokenWithLogprobs) -> dict[str, float]:
        """Includes the chosen token. Parts of characters may have the same text; the likeliest one counts."""
        known = [*token.logprobs.top, (token.token_id, token.logprobs.logprob)]
        return {self._text(token_id): logprob for token_id, logprob in reversed(known)}

    def _entry(self, token_id: int, logprob: float) -> _Entry:
        raw = self._tokenizer.token_bytes(token_id)
        return _Entry(token=raw.decode(errors="replace"), logprob=logprob, bytes=list(raw))

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")
