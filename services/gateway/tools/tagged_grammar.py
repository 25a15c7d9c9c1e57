"""Grammars of arguments whose values stand between tags.

The parser makes grammars of JSON from schemas. Here the parameters and the texts among their values become
explicit rules; all other values are written as JSON and left to the parser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.tool_formats import PARAMETER, PARAMETER_END
from services.gateway.json_schemas import moved
from services.gateway.tools.parameter_kinds import plain_text

_KNOWN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
_NO_KEY = frozenset(">\n")
_ANY_KEY = "/[^<>\\n]+/"
_NOTHING = json.dumps("")
_END = json.dumps(f"\n{PARAMETER_END}\n")


def tagged_rules(name: str, schema: Mapping[str, Any], spacing: Mapping[str, Any], place: str) -> list[str]:
    """The rule `name` for arguments that satisfy the schema, and the rules it needs.

    spacing: settings for JSON values. place: where the schema is in the request. Raises InvalidRequestError
    for what cannot be enforced.
    """
    return _Rules(name, schema, spacing, place).all()


class _Rules:
    def __init__(self, name: str, root: Mapping[str, Any], spacing: Mapping[str, Any], place: str) -> None:
        self._name, self._root, self._spacing, self._place = name, root, spacing, place

    def all(self) -> list[str]:
        """Parameters come in the order in which the model is shown them."""
        properties, required = self._root.get("properties", {}), self._root.get("required", [])
        for keyword in self._root.keys() - _KNOWN:
            self._refuse(repr(keyword))
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            self._refuse(f"an object of {properties!r:.80}")
        for one in required:
            if one not in properties:
                self._refuse(f"the property {one!r:.80}, which is not described,")
        others = self._root.get("additionalProperties", True)
        if not properties and others is not False:
            value = f"{self._name}_other"
            line = f'{self._name}: ("{PARAMETER}" {_ANY_KEY} ">\\n" {value})*'
            return [line, *self._value(value, None if others is True else others)]
        lines: list[str] = []
        parts = []
        for index, (key, one) in enumerate(properties.items()):
            if not key or _NO_KEY & set(key):
                self._refuse(f"the property {key!r:.80}")
            value = f"{self._name}_{index}"
            part = f"{json.dumps(f'{PARAMETER}{key}>' + chr(10), ensure_ascii=False)} {value}"
            parts.append(part if key in required else f"({part})?")
            lines += self._value(value, one)
        return [f"{self._name}: {' '.join(parts) or _NOTHING}", *lines]

    def _value(self, name: str, schema: object) -> Sequence[str]:
        """Rules for a value and the tag behind it. schema: None: any."""
        if schema is None:
            return [_text_rule(name, "*")]
        if schema is False:
            self._refuse("a property that cannot be")
        text = plain_text(schema, self._root)
        if text is None:
            return [f"{name}: {name}_json {_END}", f"{name}_json: %json {self._json(schema)}"]
        values = text.get("enum", [text["const"]] if "const" in text else None)
        if values is not None:
            texts = (json.dumps(f"{one}\n{PARAMETER_END}\n", ensure_ascii=False) for one in values)
            return [f"{name}: {' | '.join(texts)}"]
        least, most = text.get("minLength", 0), text.get("maxLength")
        if not isinstance(least, int) or not isinstance(most, int | None):
            self._refuse(f"a text of {least!r:.20} to {most!r:.20} characters")
        bounded = least > 0 or most is not None
        return [_text_rule(name, f"{{{least},{'' if most is None else most}}}" if bounded else "*")]

    def _json(self, schema: object) -> str:
        """The schema as a root of its own. References in it start from the whole schema."""
        inner = dict(schema) if isinstance(schema, Mapping) else {}
        if '"$ref"' in json.dumps(inner):
            whole = {"type": "object", **self._root}
            inner = {**_dict(moved(inner, _WHOLE)), "$defs": {"whole": moved(whole, _WHOLE)}}
        return json.dumps({**inner, "x-guidance": self._spacing}, ensure_ascii=False)

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidRequestError(
            f"{self._place}: {what} cannot be demanded where calls are written as this model writes them",
            field=self._place,
        )


_WHOLE = "/$defs/whole"


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text_rule(name: str, length: str) -> str:
    """A text must end (lazily) at the first closing tag, or it could include it."""
    return f"{name}[lazy]: /(.|\\n){length}/ {_END}"
