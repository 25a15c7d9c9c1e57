"""Strips JSON schemas of annotations, the keywords that do not constrain values."""

from __future__ import annotations

from dspark_core.tokenization.schema_numbers import BY_NAME, VALUES

_ANNOTATIONS = frozenset(
    ("title", "description", "examples", "default", "deprecated", "readOnly", "writeOnly", "$comment")
)


def without_annotations(schema: object) -> object:
    """An equivalent schema. Descriptions are the larger part of the schemas that clients send."""
    if isinstance(schema, list):
        return [without_annotations(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value if name in VALUES else _inner(name, value)
        for name, value in schema.items()
        if name not in _ANNOTATIONS
    }


def _inner(name: str, value: object) -> object:
    if name in BY_NAME and isinstance(value, dict):
        return {key: without_annotations(one) for key, one in value.items()}
    return without_annotations(value)


def moved(schema: object, place: str) -> object:
    """The schema with its local references adjusted for a position below `place` of another schema."""
    if isinstance(schema, list):
        return [moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: moved(value, place) for name, value in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = f"#{place}{reference[1:]}"
    return found
