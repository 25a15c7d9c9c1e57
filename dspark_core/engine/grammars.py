"""Requests' grammars, compiled for the target's tokens: which tokens may come next, and which must.

llguidance (https://github.com/guidance-ai/llguidance) does the parsing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt

from dspark_core.errors import DSparkError, InvalidRequestError
from dspark_core.output_rules import Grammar
from dspark_core.records import GenerateRequest
from dspark_core.tokenization.deep_threads import deep_thread
from dspark_core.tokenization.grammar_sources import AddedTokens, first_line, grammar_source
from dspark_core.tokenization.loading import load_tokenizer

_log = logging.getLogger(__name__)

CALL_SECONDS = 0.010
"""Processor time that each question to a grammar may take on average; most take some 50 us."""
SPARE_SECONDS = 1.0
"""Processor time beyond that. A sequence whose grammar has used it up fails: all others of its batch wait for
each answer, and a grammar of a few hundred bytes can take 0.1 s for every token."""
SHARED_SPARE_SECONDS, REFILL = 1.0, 0.05
"""The same for all sequences together, and the share of time at which it comes back: what one request may
do, many requests may not do one after the other."""
LEAST_SPARE_SECONDS = 0.1
"""What a sequence may use while nothing is left for all together: some grammars are only slow to begin."""


@dataclass(frozen=True, slots=True)
class TokenizerDocument:
    """What a grammar needs to know about the target's tokens."""

    document: str
    """The tokenizer as serialised by `tokenizers`."""
    end_token_ids: tuple[int, ...]
    vocab_size: int = 0
    """Number of its tokens, which may be more than the target has logits for."""

    def added_texts(self) -> tuple[str, ...]:
        """The texts of its added tokens."""
        return tuple(token["content"] for token in json.loads(self.document).get("added_tokens", ()))


def read_tokenizer(path: Path) -> TokenizerDocument:
    """Reads the tokenizer of the target at `path`. Raises ConfigError or CheckpointError."""
    tokenizer = load_tokenizer(path)
    return TokenizerDocument(tokenizer.document, tokenizer.stop_token_ids, tokenizer.vocab_size)


class SharedSpare:
    """Processor time that all sequences' grammars together may use beyond what each question may take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._at = SHARED_SPARE_SECONDS, clock()

    @property
    def used_up(self) -> bool:
        return self._refilled() < 0.0

    def take(self, seconds: float) -> None:
        self._left, self._at = self._refilled() - seconds, self._clock()

    def _refilled(self) -> float:
        return min(self._left + REFILL * (self._clock() - self._at), SHARED_SPARE_SECONDS)


class Budget:
    """Processor time of one sequence's grammar, copies included."""

    def __init__(self, shared: SharedSpare) -> None:
        self._spare = SPARE_SECONDS
        self._shared = shared
        self.slow = False
        """Whether the latest question took half of its time or more."""

    @property
    def used_up(self) -> bool:
        used = SPARE_SECONDS - self._spare
        return used > SPARE_SECONDS or (used > LEAST_SPARE_SECONDS and self._shared.used_up)

    @contextmanager
    def call(self) -> Iterator[None]:
        started = time.thread_time()
        yield
        beyond = time.thread_time() - started - CALL_SECONDS
        self.slow = beyond > -CALL_SECONDS / 2
        self._spare = min(self._spare - beyond, SPARE_SECONDS)
        if beyond > 0.0:
            self._shared.take(beyond)


class SequenceGrammar:
    """A grammar and one sequence's position in it."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocab_size: int,
        end_token_ids: tuple[int, ...] = (),
        budget: Budget | None = None,
    ) -> None:
        """budget: of the sequence; None: its own, with nobody to share with."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._failure: str | None = None
        self._budget = budget or Budget(SharedSpare())

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that may follow a complete output, whether or not the request stops at them."""
        return self._end_token_ids

    @property
    def complete(self) -> bool:
        """Whether only the end can follow."""
        return self.problem is None and bool(self._matcher.is_stopped())

    @property
    def problem(self) -> str | None:
        """Why it cannot go on: some grammars grow beyond what llguidance follows. None: it can."""
        if self._matcher.is_error():
            return first_line(self._matcher.get_error())
        if self._failure is None and self._budget.used_up:
            return "too complex: finding the tokens that may follow takes too long"
        return self._failure

    def fail(self, problem: str) -> None:
        """Notes that the grammar cannot continue."""
        self._failure = problem

    def ahead(self) -> SequenceGrammar:
        """To go on with, by tokens that may not stand, and to forget. Copying takes two microseconds; taking
        tokens back is not possible with every grammar."""
        copied = self._matcher.deep_copy()
        return SequenceGrammar(copied, self._vocab_size, self._end_token_ids, self._budget)

    def take(self, token_ids: Sequence[int]) -> int:
        """Goes on by as many of the tokens as may follow -> how many."""
        with self._budget.call():
            return int(self._matcher.try_consume_tokens(list(token_ids)))

    def follow(self, token_ids: Sequence[int]) -> None:
        """Goes on by tokens that were generated under it, each in the time that it had then."""
        for token_id in token_ids:
            if self.problem is None and self.take((token_id,)) == 0 and self.problem is None:
                self.fail(f"token {token_id} of the output so far does not follow")

    def allowed(self) -> npt.NDArray[np.uint8]:
        """What may come next, 1 or 0 by token id -> [vocab]."""
        with self._budget.call():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little")

    def forced(self) -> tuple[int, ...]:
        """Tokens of what must come next, as the tokenizer writes it; mostly none."""
        with self._budget.call():
            tokens = self._matcher.compute_ff_tokens()
        return tuple(takewhile(lambda token_id: token_id < self._vocab_size, tokens))

    def valid(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens may follow, one after the other; fewer if that takes long to find out.

        Draft tokens are not worth waiting for, and with some grammars a dozen takes a second.
        """
        ahead, count, size = self.ahead(), 0, 1
        while count < len(token_ids) and not self._budget.slow:
            piece = token_ids[count : count + size]
            taken = ahead.take(piece)
            count, size = count + taken, 2 * size
            if taken < len(piece):
                break
        return count


class GrammarCompiler:
    """Thread-safe."""

    def __init__(self, tokenizer: Callable[[], TokenizerDocument], vocab_size: int) -> None:
        """`tokenizer` is called once; `vocab_size` is that of the target's logits."""
        self._load = tokenizer
        self._vocab_size = vocab_size
        self._thread = deep_thread("grammar-compile")
        self._tokens: llguidance.LLTokenizer | None = None
        self._added = AddedTokens()
        self._end_token_ids: tuple[int, ...] = ()
        self._spare = SharedSpare()

    def prepare(self) -> None:
        """Loads the tokenizer before the first request, as that blocks the whole process for up to 1 s."""
        try:
            self._thread.submit(self._tokenizer).result()
        except DSparkError as error:
            _log.warning("requests with a grammar will be refused: %s", error)

    def compile(self, request: GenerateRequest, asked: Grammar) -> Future[SequenceGrammar]:
        """Takes a millisecond for most grammars, but much longer for malicious ones. The future fails with
        InvalidRequestError for an invalid grammar or one that does not suit these tokens."""
        return self._thread.submit(self._compile, request, asked)

    def _compile(self, request: GenerateRequest, asked: Grammar) -> SequenceGrammar:
        tokens = self._tokenizer()
        source = grammar_source(asked, self._added)
        matcher = llguidance.LLMatcher(tokens, source, log_level=0)
        grammar = SequenceGrammar(matcher, self._vocab_size, self._end_token_ids, Budget(self._spare))
        if request.generated_tokens:  # by a verifier that was lost
            grammar.follow(request.prompt_token_ids[-request.generated_tokens :])
        first = grammar.ahead()
        if grammar.problem is None:
            first.allowed()  # some grammars exceed the limits at their first token
        problem = grammar.problem or first.problem
        if problem is not None:
            raise InvalidRequestError(f"grammar: {problem}", field="grammar")
        return grammar

    def _tokenizer(self) -> llguidance.LLTokenizer:
        """Must run on the compiler's own thread."""
        if self._tokens is None:
            known = self._load()
            self._end_token_ids = tuple(end for end in known.end_token_ids if end < self._vocab_size)
            self._added = AddedTokens(known.added_texts())
            size = max(self._vocab_size, known.vocab_size)
            try:
                self._tokens = llguidance.LLTokenizer(
                    known.document, n_vocab=size, eos_token=list(known.end_token_ids)
                )
            except ValueError as error:
                raise InvalidRequestError(
                    f"grammar: not for this model's tokenizer: {first_line(str(error))}", field="grammar"
                ) from None
        return self._tokens
