"""Checks a request and turns it into tokens: model name, chat template, defaults, context limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, LogitAdjustments
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, VerifierDescription
from dspark_core.tokenization.grammar_checking import GrammarChecker
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.tokenization.tool_formats import ToolFormat
from services.gateway.prompt_encoding import EncodedPrompt, PromptEncoder
from services.gateway.requests import DEFAULT_TIER_NAME, TextRequest
from services.gateway.served_model import ServedModel, too_long
from services.gateway.thoughts.thought_preparation import ThoughtPreparer, ThoughtReading
from services.gateway.thread_work import ThreadWork
from services.gateway.tools.tool_preparation import CallReading, ToolPreparer

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    request: GenerateRequest
    stop: tuple[str, ...]
    grammar_field: str = "grammar"
    """The client's field from which the grammar was made."""
    floor_field: str | None = "min_tokens_per_second"
    """The client's field that sets the speed floor; None: set by its tier."""
    calls: CallReading | None = None
    """How to find tool calls in the answer; None: no tool may be called."""
    thought: ThoughtReading | None = None
    """How to find the thought before the answer; None: there is none, or it counts as text."""
    tier: str = DEFAULT_TIER_NAME
    choice: int = 0
    """Index of the answer that this request generates."""
    repeats_prompt: bool = False
    """Another choice of the same prompt comes before this one."""


class RequestPreparer:
    def __init__(
        self,
        model: ServedModel,
        tokenizer: Tokenizer,
        tool_format: ToolFormat | None = None,
        *,
        reasoning: bool = True,
    ) -> None:
        """tool_format: how the model writes tool calls; None: as its chat template does. reasoning: tell
        thoughts from answers, if the chat template says how they are marked."""
        self._model = model
        self._tokenizer = tokenizer
        self._grammars = GrammarChecker()
        self._tools = ToolPreparer(tokenizer, self._grammars, tool_format)
        self._encoder = PromptEncoder(tokenizer, self._tools)
        marks = tokenizer.thought_marks if reasoning else None
        self._thoughts = None if marks is None else ThoughtPreparer(tokenizer, marks)

    async def prepare(self, request: TextRequest, work: ThreadWork | None = None) -> PreparedRequest:
        """Raises InvalidRequestError or a subclass; UnavailableError while no verifier is known.

        work: tracks the thread work that continues if this is cancelled.
        """
        work = work or ThreadWork()
        self._model.check_name(request.model)
        sampling = self._sampling(request)
        if request.grammar is not None:
            await work.wait(self._grammars.check(request.grammar, request.grammar_field, work.owner))
        grammar, field, calls = request.grammar, request.grammar_field, None
        if request.tools is not None:
            grammar, field = await self._tools.grammar(request.tools, request.grammar, work), "tools"
            calls = self._tools.reading(request.tools, grammar)
        description = await self._model.describe()
        limit = description.max_context_tokens
        prompt = await self._encoder.encode(request, limit, work)
        self._check_prompt(prompt.token_ids, request, description)
        _check_biases(request.adjustments, description)
        thought = self._thought(prompt)
        if grammar is not None and thought is not None:
            grammar = self._after(thought, grammar, field)
        return PreparedRequest(
            request=GenerateRequest(
                request_id=request.request_id,
                prompt_token_ids=prompt.token_ids,
                max_tokens=_max_tokens(request.max_tokens, limit - len(prompt.token_ids)),
                sampling=sampling,
                stop_token_ids=() if request.ignore_eos else self._tokenizer.stop_token_ids,
                speculation=_bounded(request.speculation, limit),
                min_tokens_per_second=request.min_tokens_per_second,
                floor_promised=request.floor_promised,
                tier=request.tier,
                cache_salt=request.full_cache_salt,
                adjustments=_reachable(request.adjustments, limit),
                grammar=grammar,
                top_logprobs=request.top_logprobs,
            ),
            stop=request.stop,
            grammar_field=field,
            floor_field=request.floor_field,
            calls=calls,
            thought=thought,
            tier=request.tier,
        )

    def _thought(self, prompt: EncodedPrompt) -> ThoughtReading | None:
        if self._thoughts is None or prompt.end is None:
            return None
        return self._thoughts.reading(prompt.end)

    def _after(self, thought: ThoughtReading, grammar: Grammar, field: str) -> Grammar:
        if self._thoughts is None:
            raise AssertionError("a thought is expected of a model that does not think")
        try:
            return self._thoughts.grammar(grammar, thought)
        except InvalidRequestError as error:
            raise error.about(field) from None

    def _sampling(self, request: TextRequest) -> SamplingParams:
        defaults = self._tokenizer.defaults
        top_k = _first(request.top_k, defaults.top_k, 0)
        return SamplingParams(
            temperature=_first(request.temperature, defaults.temperature, 1.0),
            # Values beyond the vocabulary size all mean the same, but may not fit the wire format.
            top_k=min(top_k, self._tokenizer.vocab_size),
            top_p=_first(request.top_p, defaults.top_p, 1.0),
            min_p=_first(request.min_p, defaults.min_p, 0.0),
            seed=request.seed,
        )

    def _check_prompt(
        self, ids: Sequence[int], request: TextRequest, description: VerifierDescription
    ) -> None:
        field = request.prompt_field
        if not ids:
            raise InvalidRequestError(f"{field} must not be empty: it has no tokens", field=field)
        if len(ids) >= description.max_context_tokens:
            raise too_long(field, str(len(ids)), description.max_context_tokens)
        wrong = next((token_id for token_id in ids if not 0 <= token_id < description.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"{field} token ids must be in [0, {description.vocab_size - 1}], got {wrong}", field=field
            )


def _check_biases(adjustments: LogitAdjustments, description: VerifierDescription) -> None:
    for token_id, _ in adjustments.logit_bias:
        if token_id >= description.vocab_size:
            raise InvalidRequestError(
                f"logit_bias token ids must be in [0, {description.vocab_size - 1}], got {token_id}",
                field="logit_bias",
            )


def _reachable(adjustments: LogitAdjustments, limit: int) -> LogitAdjustments:
    """Values of `min_tokens` beyond the context limit all mean the same, but may not fit the wire format."""
    if adjustments.min_tokens <= limit:
        return adjustments
    return dataclasses.replace(adjustments, min_tokens=limit)


def _first(given: _Number | None, default: _Number | None, fallback: _Number) -> _Number:
    if given is not None:
        return given
    return fallback if default is None else default


def _max_tokens(asked: int | None, room: int) -> int:
    """At most what fits: generation then ends with `length`, as it would at the context limit."""
    return room if asked is None else min(asked, room)


def _bounded(options: SpeculationOptions, limit: int) -> SpeculationOptions:
    """A draft token limit beyond the context limit means no limit, but may not fit the wire format."""
    if options.max_draft_tokens is None or options.max_draft_tokens <= limit:
        return options
    return dataclasses.replace(options, max_draft_tokens=limit)
