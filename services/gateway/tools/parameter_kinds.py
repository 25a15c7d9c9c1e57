"""How the values of a function's parameters are written where tags, not JSON, hold them together.

A text stands there without quotes, so only the schema tells the text `12` from the number. Grammars and the
reading of answers both decide by what is said here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Templates write these values as Python does."""
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
_ALL = frozenset({*_TYPES.values(), "object"})
_OF_TEXT = frozenset({"type", "minLength", "maxLength", "enum", "const"})
"""Keywords with a rule of their own. Strings with others, as `pattern`, are left to the parser as JSON."""
_MOST_SCHEMAS = 64
"""Looked at for one parameter: references may lead anywhere."""


@dataclass(frozen=True, slots=True)
class ParameterKind:
    types: frozenset[str] = _ALL
    """JSON types that a value may have."""
    plain: bool = False
    """Texts are written as they are, and nothing else is written but null where `types` has it. Otherwise
    values are JSON, though a text whose quotes were forgotten is still read."""

    @property
    def streams(self) -> bool:
        """Whether each character of a value is known to belong to a text before the value ends."""
        return self.plain and "null" not in self.types

    def json_of(self, written: str) -> str:
        """The value as JSON."""
        word = _WORDS.get(written.strip(), written.strip())
        if self.plain:
            return word if word == "null" and "null" in self.types else _text(written)
        try:
            value = json.loads(word, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return _text(written)
        kind = _TYPES.get(type(value), "object")
        fits = kind in self.types or (kind == "integer" and "number" in self.types)
        return word if fits else _text(written)


@dataclass(frozen=True, slots=True)
class ParameterKinds:
    """Those of one function."""

    named: Mapping[str, ParameterKind] = field(default_factory=dict)
    other: ParameterKind = ParameterKind()

    def of(self, name: str) -> ParameterKind:
        return self.named.get(name, self.other)


def parameter_kinds(schema: Mapping[str, Any]) -> ParameterKinds:
    """schema: JSON schema of the arguments, without annotations."""
    properties = schema.get("properties")
    named = properties if isinstance(properties, Mapping) else {}
    return ParameterKinds(
        {name: kind_of(one, schema) for name, one in named.items()},
        kind_of(schema.get("additionalProperties"), schema),
    )


def kind_of(schema: object, root: Mapping[str, Any]) -> ParameterKind:
    """root: the schema that references start from. What is not understood may be any JSON."""
    alternatives = _alternatives(schema, root)
    types = frozenset[str]().union(*(_types(one) for one in alternatives))
    return ParameterKind(types, plain=plain_text(schema, root) is not None)


def plain_text(schema: object, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of the texts that are values, if they are written without quotes."""
    alternatives = _alternatives(schema, root)
    texts = [one for one in alternatives if _types(one) != {"null"}]
    if len(texts) != 1:
        return None
    (text,), types = texts, _types(texts[0])
    may_be_null = len(alternatives) > 1 or "null" in types
    if "string" not in types or not types <= {"string", "null"}:
        return None
    # Null is written as a text `null` could be, so what else is asked of a text must not rule that out.
    return text if text.keys() <= ({"type"} if may_be_null else _OF_TEXT) else None


def _alternatives(schema: object, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas of which a value satisfies one; an empty one if they cannot be told."""
    found: list[Mapping[str, Any]] = []
    waiting = [schema]
    for _ in range(_MOST_SCHEMAS):
        if not waiting:
            return found
        one = waiting.pop()
        if not isinstance(one, Mapping):
            found.append({})
        elif one.keys() == {"$ref"}:
            waiting.append(_at(one["$ref"], root))
        elif one.keys() == {"anyOf"} and isinstance(one["anyOf"], list):
            waiting += one["anyOf"]
        else:
            found.append(one)
    return [{}]


def _at(reference: object, root: Mapping[str, Any]) -> object:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: object = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(_TYPES.get(type(value), "object") for value in values)
    given = schema.get("type")
    types = frozenset(one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str))
    return types or _ALL


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(word: str) -> NoReturn:
    raise ValueError(word)
