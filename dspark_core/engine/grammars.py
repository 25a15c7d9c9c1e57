"""Grammars of requests, compiled for the target's tokens: what may come next, and what must.

llguidance (https://github.com/guidance-ai/llguidance) does the parsing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt

from dspark_core.errors import InvalidRequestError
from dspark_core.records import GenerateRequest
from dspark_core.tokenization.grammar_sources import first_line, grammar_source
from dspark_core.tokenization.loading import load_tokenizer


@dataclass(frozen=True, slots=True)
class TokenizerDocument:
    """What a grammar has to know of the target's tokens."""

    document: str
    """The tokenizer as `tokenizers` writes it."""
    end_token_ids: tuple[int, ...]


def read_tokenizer(path: Path) -> TokenizerDocument:
    """Of the target that lies there. Raises ConfigError or CheckpointError."""
    tokenizer = load_tokenizer(path)
    return TokenizerDocument(tokenizer.document, tokenizer.stop_token_ids)


class SequenceGrammar:
    """How far one sequence's output has come."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def complete(self) -> bool:
        """Nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def take(self, token_ids: Sequence[int]) -> int:
        """Goes on by as many of the tokens as may follow -> how many."""
        return int(self._matcher.try_consume_tokens(list(token_ids)))

    def give_back(self, count: int) -> None:
        """The last tokens that were taken."""
        if count:
            self._matcher.rollback(count)

    def allowed(self) -> npt.NDArray[np.uint8]:
        """What may come next, 1 or 0 by token id -> [vocab]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little")

    def forced(self) -> tuple[int, ...]:
        """Tokens of what must come next, as the tokenizer writes it; mostly none."""
        return tuple(self._matcher.compute_ff_tokens())

    def valid(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens may follow, one after the other."""
        return int(self._matcher.validate_tokens(list(token_ids)))


class GrammarCompiler:
    """Threads may share it."""

    def __init__(self, tokenizer: Callable[[], TokenizerDocument], vocab_size: int) -> None:
        """`tokenizer` is asked for when the first grammar comes; `vocab_size`: of the target's logits."""
        self._load = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None

    def compile(self, request: GenerateRequest) -> SequenceGrammar | None:
        """None: the request has none. Takes a millisecond for most, and seconds for those that are meant to.
        Raises InvalidRequestError for a grammar that is none, or none for these tokens."""
        if request.grammar is None:
            return None
        matcher = llguidance.LLMatcher(self._tokenizer(), grammar_source(request.grammar), log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(f"grammar: {first_line(matcher.get_error())}", field="grammar")
        grammar = SequenceGrammar(matcher, self._vocab_size)
        if request.generated_tokens:  # by a verifier that was lost
            grammar.take(request.prompt_token_ids[-request.generated_tokens :])
        return grammar

    def _tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokens is None:
                known = self._load()
                try:
                    self._tokens = llguidance.LLTokenizer(
                        known.document, n_vocab=self._vocab_size, eos_token=list(known.end_token_ids)
                    )
                except ValueError as error:
                    raise InvalidRequestError(
                        f"grammar: not for this model's tokenizer: {first_line(str(error))}", field="grammar"
                    ) from None
            return self._tokens
