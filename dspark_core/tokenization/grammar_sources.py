"""Translates request grammars to llguidance's notation, and checks that it can parse them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from llguidance import LLMatcher

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.schema_numbers import exact_numbers

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|/(?:[^/\\\n]|\\.)+/')
"""Matches strings, including those of embedded JSON, and regular expressions in Lark's notation. Anything
outside them only names tokens."""
_JSON_IN_LARK = re.compile(rf"{_QUOTED.pattern}|(?:#|//)[^\n]*|(?P<json>%json\s*)")
"""Matches where JSON begins, and what may look like that: strings, regular expressions and comments."""
_UNFORCED = '%llguidance {"no_forcing": true}\n'


class AddedTokens:
    """The texts of a tokenizer's added tokens, which match wherever they occur in text."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        by_first: dict[str, list[str]] = {}
        for text in filter(None, texts):
            by_first.setdefault(text[0], []).append(text)
        self._by_first = {first: tuple(some) for first, some in by_first.items()}

    def spelt_in(self, text: str) -> bool:
        known = self._by_first
        return bool(known) and any(
            first in known and text.startswith(known[first], place) for place, first in enumerate(text)
        )


_NONE_ADDED = AddedTokens()


def grammar_source(grammar: Grammar, added_tokens: AddedTokens = _NONE_ADDED) -> str:
    """added_tokens: those of the tokenizer that the output is made of.

    llguidance tokenizes forced text as the tokenizer would, which yields an added token where the text spells
    one. It then allows only that token but rejects it when it comes, because it does not count added tokens
    as text. Forcing is therefore disabled for such grammars.

    Raises InvalidRequestError for a schema that is not JSON, or has numbers that cannot be demanded.
    """
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            text = _json(grammar.text)
        case GrammarKind.LARK:
            text = _lark(grammar.text)
        case GrammarKind.REGEX:
            text = grammar.text
    unforced = added_tokens.spelt_in(_spelt(grammar.kind, text))
    if unforced and grammar.kind is not GrammarKind.LARK:
        return f"{_UNFORCED}{lark_source(grammar)}"
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return str(LLMatcher.grammar_from_json_schema(text))
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(text))
        case GrammarKind.LARK:
            has_settings = text.lstrip().startswith("%llguidance")
            settings = _UNFORCED if unforced and not has_settings else ""
            return str(LLMatcher.grammar_from_lark(settings + text))


def lark_source(grammar: Grammar) -> str:
    """The same grammar in Lark's notation. Raises InvalidRequestError as `grammar_source` does."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"start: %json {_json(grammar.text)}"
        case GrammarKind.REGEX:
            regex = json.loads(str(LLMatcher.grammar_from_regex(grammar.text)))
            return str(regex["grammars"][0]["lark_grammar"])
        case GrammarKind.LARK:
            return grammar.text


def _lark(text: str) -> str:
    """The grammar with the schemas in it as `_json` has them."""
    parts: list[str] = []
    place = 0
    while found := _JSON_IN_LARK.search(text, place):
        parts.append(text[place : found.end()])
        place = found.end()
        if found["json"]:
            with _refusing():
                schema, place = _DECODER.raw_decode(text, place)
                parts.append(_dumped(schema))
    return "".join((*parts, text[place:]))


def _json(schema: str) -> str:
    """The schema without unnecessary escapes, and with numbers that llguidance can hold."""
    with _refusing():
        return _dumped(_DECODER.decode(schema))


def _dumped(schema: object) -> str:
    text = json.dumps(exact_numbers(schema), ensure_ascii=False)
    text.encode()  # escapes may form lone surrogates, which are not text
    return text


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except InvalidRequestError as error:
        raise error.about("grammar") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"grammar: the schema is no JSON: {error}", field="grammar") from None


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"it has the number {word}")


def _finite(word: str) -> float:
    number = float(word)
    return number if math.isfinite(number) else _refuse_constant(word)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _spelt(kind: GrammarKind, text: str) -> str:
    """A superset of the text the output may have to spell, without escapes of regular expressions."""
    spelt = "\n".join(_QUOTED.findall(text)) if kind is GrammarKind.LARK else text
    return spelt.replace("\\", "")


def problem_of(grammar: Grammar) -> str | None:
    """Why it is no grammar with any tokenizer; None: it is one."""
    try:
        problem = str(LLMatcher.validate_grammar(grammar_source(grammar)))
    except InvalidRequestError as error:
        return str(error).removeprefix("grammar: ")
    return first_line(problem) if problem else None


_MOST_SHOWN = 120
_IN_OTHER_WORDS = {"NoExtensionBias": "matches no text that this model can write"}


def first_line(text: str) -> str:
    """First line of an llguidance message, or what that means. For an invalid regular expression that line
    says nothing else, so the expression and the reason are added from later lines."""
    lines = text.strip().splitlines() or [""]
    message = lines[0]
    reason = next((line for line in lines[1:] if line.startswith("error: ")), None)
    if message.endswith("error:") and reason is not None:
        return f"{message} {lines[1].strip():.{_MOST_SHOWN}}: {reason.removeprefix('error: ')}"
    return _IN_OTHER_WORDS.get(message, message)
