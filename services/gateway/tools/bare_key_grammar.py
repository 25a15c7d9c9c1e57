"""Grammars of arguments with unquoted keys, and with strings between marks of the model's own.

Clients send JSON schemas, from which the parser only makes grammars of JSON. Here objects, lists and strings
become explicit rules in the model's notation; all other values are written as in JSON and left to the parser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.tool_formats import BARE_KEY

_OBJECT, _LIST, _TEXT = "object", "array", "string"
_OF_TYPE = {
    _OBJECT: {"properties", "required", "additionalProperties"},
    _LIST: {"items", "minItems", "maxItems"},
    _TEXT: {"minLength", "maxLength"},
}
"""Supported keywords by type; those of numbers are left to the parser."""
_OF_JSON_TEXT = {"pattern", "format"}
_BESIDE_ALL = {"type", "$defs", "definitions", "$schema", "$id"}
_TYPES = (_OBJECT, _LIST, _TEXT, "number", "integer", "boolean", "null")


@dataclass(frozen=True, slots=True)
class Texts:
    """How strings are written, in the grammar's notation."""

    quote: str
    words: str
    """Name of the rule for what may stand between quotes."""
    quote_is_token: bool


ANY = "any_value"


def rules_of_any(texts: Texts) -> tuple[str, ...]:
    """Rules for arbitrary values, which the rules of schemas refer to."""
    return (
        f"{ANY}: any_text | any_number | any_word | any_list | {ANY_OBJECT}",
        *_text_rules("any_text", texts),
        'any_number: %json {"type": "number"}',
        'any_word: "true" | "false" | "null"',
        f'any_list: "[" ({ANY} ("," {ANY})*)? "]"',
        f'{ANY_OBJECT}: "{{" (any_pair ("," any_pair)*)? "}}"',
        f'any_pair: ANY_KEY ":" {ANY}',
        f"ANY_KEY: /{BARE_KEY.pattern}/",
    )


ANY_OBJECT = "any_object"


def rules_of(name: str, schema: Mapping[str, Any], texts: Texts, place: str) -> tuple[str, ...]:
    """The rule `name` for values that satisfy the schema, and the rules it needs.

    place: where the schema is in the request. Raises InvalidRequestError for what cannot be enforced.
    """
    rules = _Rules(name, schema, texts, place)
    try:
        rules.add(name, schema)
    except RecursionError:
        rules.refuse("its depth")
    return tuple(rules.lines)


def _text_rules(name: str, texts: Texts, least: int = 0, most: int | None = None) -> tuple[str, ...]:
    """least, most: length in characters."""
    bounded = least > 0 or most is not None
    length = f"{{{least},{'' if most is None else most}}}"
    if texts.quote_is_token:
        words = f"/(.|\\n){length}/" if bounded else texts.words
        return (f"{name}: {texts.quote} {words} {texts.quote}",)
    # If the mark is text, the string must end (lazily) at the first one, or it could include it.
    return (
        f"{name}: {texts.quote} {name}_end",
        f"{name}_end[lazy]: /(.|\\n){length if bounded else '*'}/ {texts.quote}",
    )


class _Rules:
    def __init__(self, name: str, root: Mapping[str, Any], texts: Texts, place: str) -> None:
        self.lines: list[str] = []
        self._name, self._root, self._texts, self._place = name, root, texts, place
        self._count = 0
        self._referred: dict[str, str] = {}

    def refuse(self, what: str) -> NoReturn:
        raise InvalidRequestError(
            f"{self._place}: {what} cannot be demanded where calls are written as this model writes them",
            field=self._place,
        )

    def add(self, name: str, schema: object) -> None:
        self.lines.append("")  # reserves its place before the rules it needs
        place = len(self.lines) - 1
        self.lines[place] = f"{name}: {self._alternatives(schema)}"

    def _new(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"

    def _rule(self, schema: object) -> str:
        """Returns the name of a rule for the schema."""
        if schema in (True, {}):
            return ANY
        name = self._new()
        self.add(name, schema)
        return name

    def _alternatives(self, schema: object) -> str:
        if schema in (True, {}):
            return ANY
        if not isinstance(schema, Mapping):
            self.refuse(repr(schema)[:80])
        for one, write in (
            ("$ref", self._reference),
            ("enum", self._values),
            ("const", lambda value: self._values([value])),
            ("anyOf", self._any_of),
            ("allOf", self._any_of),
        ):
            if one in schema:
                self._check_keywords(schema, {one})
                if one == "allOf" and len(schema[one]) != 1:
                    self.refuse("'allOf' of several schemas")
                return write(schema[one])
        return " | ".join(self._typed(schema, kind) for kind in self._types(schema))

    def _check_keywords(self, schema: Mapping[str, Any], known: set[str]) -> None:
        for keyword in schema.keys() - known - _BESIDE_ALL:
            self.refuse(f"{keyword!r} beside {', '.join(sorted(map(repr, known)))}")

    def _types(self, schema: Mapping[str, Any]) -> Sequence[str]:
        given = schema.get("type")
        if given is None:
            given = [kind for kind, keywords in _OF_TYPE.items() if keywords & schema.keys()][:1]
        types = given if isinstance(given, list) else [given]
        if not types or any(one not in _TYPES for one in types):
            self.refuse(f"a schema of type {schema.get('type')!r:.80}")
        return types

    def _typed(self, schema: Mapping[str, Any], kind: str) -> str:
        # In a schema with several types, each keyword applies to one of them.
        of_others = {name for other, names in _OF_TYPE.items() if other != kind for name in names}
        if kind != _TEXT:
            of_others |= _OF_JSON_TEXT
        own = {name: value for name, value in schema.items() if name not in of_others}
        if kind in (_OBJECT, _LIST):
            self._check_keywords(own, _OF_TYPE[kind])
            return self._object(own) if kind == _OBJECT else self._list(own)
        if kind == _TEXT and not own.keys() & _OF_JSON_TEXT:
            return self._text(own.get("minLength", 0), own.get("maxLength"))
        # Strings with a pattern or format are JSON strings, which `call_translation` reads as well.
        name = self._new()
        self.lines.append(f"{name}: %json {json.dumps({**own, 'type': kind}, ensure_ascii=False)}")
        return name

    def _text(self, least: object, most: object) -> str:
        if not isinstance(least, int) or not isinstance(most, int | None):
            self.refuse(f"a text of {least!r:.20} to {most!r:.20} characters")
        name = self._new()
        self.lines += _text_rules(name, self._texts, least, most)
        return name

    def _reference(self, reference: object) -> str:
        if not isinstance(reference, str) or not reference.startswith("#"):
            self.refuse(f"the reference {reference!r:.80}")
        if reference not in self._referred:
            self._referred[reference] = self._new()
            self.add(self._referred[reference], self._at(reference))
        return self._referred[reference]

    def _at(self, reference: str) -> object:
        found: object = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                self.refuse(f"the reference {reference!r:.80}, which is to nothing,")
            found = found[name]
        return found

    def _any_of(self, schemas: object) -> str:
        if not isinstance(schemas, list) or not schemas:
            self.refuse(f"one of {schemas!r:.80}")
        return " | ".join(self._rule(schema) for schema in schemas)

    def _values(self, values: object) -> str:
        if not isinstance(values, list) or not values:
            self.refuse(f"one of {values!r:.80}")
        return " | ".join(self._value(value) for value in values)

    def _value(self, value: object) -> str:
        if isinstance(value, list | dict) or (isinstance(value, float) and not math.isfinite(value)):
            self.refuse(f"the value {value!r:.80}")
        if not isinstance(value, str):
            return json.dumps(json.dumps(value))
        words = f" {json.dumps(value, ensure_ascii=False)}" if value else ""
        return f"{self._texts.quote}{words} {self._texts.quote}"

    def _list(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if not isinstance(least, int) or not isinstance(most, int | None) or most == 0:
            self.refuse(f"a list of {least!r:.20} to {most!r:.20} items")
        item = self._rule(schema.get("items", True))
        more = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        items = f'{item} ("," {item}){more}'
        return f'"[" {items if least else f"({items})?"} "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        """Properties come in the order in which the model is shown them: by name."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            self.refuse(f"an object of {properties!r:.80}")
        more = schema.get("additionalProperties", True)
        if not properties and more is not False:
            return self._map(more, required)
        for name in required:
            if name not in properties:
                self.refuse(f"the property {name!r:.80}, which is not described,")
        names = sorted(properties, key=lambda name: (name.lower(), name))
        pairs = [self._pair(name, properties[name]) for name in names]
        optional = [name not in required for name in names]
        return f'"{{" {self._sequence(pairs, optional)} "}}"'

    def _map(self, values: object, required: Sequence[object]) -> str:
        if required:
            self.refuse("properties that are not described")
        if values in (True, {}):
            return ANY_OBJECT
        pair = f'ANY_KEY ":" {self._rule(values)}'
        return f'"{{" ({pair} ("," {pair})*)? "}}"'

    def _pair(self, name: str, schema: object) -> str:
        if BARE_KEY.fullmatch(name):
            return f"{json.dumps(f'{name}:', ensure_ascii=False)} {self._rule(schema)}"
        return f'{self._value(name)} ":" {self._rule(schema)}'

    def _sequence(self, pairs: Sequence[str], optional: Sequence[bool]) -> str:
        """A rule for the pairs in order. The first one present has no comma; later ones bring their own."""
        first, behind = '""', '""'
        for pair, may_lack in zip(reversed(pairs), reversed(optional), strict=True):
            begins, follows = self._new(), self._new()
            lacks_first, lacks_behind = (f" | {first}", f" | {behind}") if may_lack else ("", "")
            self.lines.append(f"{begins}: {pair} {behind}{lacks_first}")
            self.lines.append(f'{follows}: "," {pair} {behind}{lacks_behind}')
            first, behind = begins, follows
        return first
