"""Grammars of requests in the notation of llguidance, which parses them, and whether it can."""

from __future__ import annotations

import json
from concurrent.futures import Future

from llguidance import LLMatcher

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.deep_threads import deep_thread


def grammar_source(grammar: Grammar) -> str:
    """Raises InvalidRequestError for a schema that is no JSON."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            try:
                json.loads(grammar.text)
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError(
                    f"grammar: the schema is no JSON: {error}", field="grammar"
                ) from None
            return str(LLMatcher.grammar_from_json_schema(grammar.text))
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(grammar.text))
        case GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.text))


class GrammarChecker:
    """Threads may share it."""

    def __init__(self) -> None:
        self._thread = deep_thread("grammar-check")

    def check(self, grammar: Grammar, field: str) -> Future[None]:
        """Fails with InvalidRequestError that names `field`, for what is no grammar with any tokenizer."""
        return self._thread.submit(_check, grammar, field)


def _check(grammar: Grammar, field: str) -> None:
    try:
        problem = str(LLMatcher.validate_grammar(grammar_source(grammar)))
    except InvalidRequestError as error:
        raise error.about(field) from None
    if problem:
        raise InvalidRequestError(f"{field}: {first_line(problem)}", field=field)


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
