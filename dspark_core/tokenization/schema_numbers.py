"""Keeps numbers of JSON schemas to what llguidance can hold, so that every answer conforms to the schema.

llguidance holds numbers as doubles and makes 64-bit integers of them. Beyond 2^53 that may be a neighbour: an
answer would have another number than a `const`, or one outside its bounds.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, TypeGuard

from dspark_core.errors import InvalidRequestError

BY_NAME = frozenset(("properties", "patternProperties", "dependentSchemas", "$defs", "definitions"))
"""Keywords whose value maps names chosen by the client to schemas."""
VALUES = frozenset(("const", "enum"))
"""Keywords whose value is not a schema, nor an annotation."""
_EXAMPLES = frozenset(("default", "examples"))
_EXACT = 2**53
"""Doubles tell all smaller numbers from their neighbours."""
_LARGEST = 2**63 - 1
_BOUNDS = ((1, "minimum", "exclusiveMinimum"), (-1, "maximum", "exclusiveMaximum"))
_OUTERMOST = 2**63 - 1024
"""The largest double among 64-bit integers; bounds beyond it, and below its negative, come down to it."""


def exact_numbers(schema: object) -> object:
    """A schema of which every value conforms to this one too: bounds are narrowed to the nearest double.

    Raises InvalidRequestError for what cannot be narrowed, such as a `const`.
    """
    if isinstance(schema, list):
        return [exact_numbers(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return _narrowed({name: _inner(name, value) for name, value in schema.items()})


def _inner(name: str, value: object) -> object:
    if name in VALUES:
        _check_values(name, value)
        return value
    if name in _EXAMPLES:
        return value
    if name in BY_NAME and isinstance(value, dict):
        return {key: exact_numbers(one) for key, one in value.items()}
    return exact_numbers(value)


def _check_values(name: str, value: object) -> None:
    if isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            _check_values(name, one)
    elif _is_number(value) and not _held(value):
        raise InvalidRequestError(
            f"{name} cannot demand {value}: of numbers beyond 2^53, only 64-bit integers that a double holds"
        )


def _held(value: float) -> bool:
    if abs(value) > _LARGEST:
        return False
    # The largest integer becomes 2^63, of which the parser then makes the largest again.
    return float(value) == value or value == _LARGEST


def _narrowed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself if its bounds are held."""
    found: dict[str, Any] = schema
    given: dict[str, float] = {}
    for sign, inclusive, exclusive in _BOUNDS:
        for name in (inclusive, exclusive):
            value = schema.get(name)
            if not _is_number(value) or abs(value) < _EXACT:
                continue
            given[name] = value
            strict = name == exclusive or schema.get(exclusive) is True  # as drafts 3 and 4 have it
            least = _least(sign * value, strict=strict, told=f"{name} {value}")
            found = {one: kept for one, kept in found.items() if one != name}
            if _is_number(other := found.get(inclusive)):
                least = max(least, sign * other)
            found[inclusive] = sign * least
    lowest, highest = found.get("minimum"), found.get("maximum")
    if given and _is_number(lowest) and _is_number(highest) and lowest > highest:
        bounds = " and ".join(f"{name} {value}" for name, value in given.items())
        raise InvalidRequestError(f"{bounds} leave no number that a double holds")
    return found


def _least(bound: float, *, strict: bool, told: str) -> float:
    """The least double that may stand for a lower bound, however the parser reads it: in rules for integers
    as it is, in those for other numbers by the shortest decimal that rounds to it."""
    if bound > _OUTERMOST or (strict and bound == _OUTERMOST):
        raise InvalidRequestError(
            f"{told} cannot be demanded: it leaves no 64-bit integer that a double holds"
        )
    double = float(max(bound, -_OUTERMOST))
    while any(one < bound or (strict and one == bound) for one in (int(double), Decimal(repr(double)))):
        double = math.nextafter(double, math.inf)
    return int(double)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
