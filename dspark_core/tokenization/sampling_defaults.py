"""Checks the sampling parameters that a checkpoint recommends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_core.errors import CheckpointError, InvalidRequestError
from dspark_core.records import SamplingParams
from dspark_core.tokenization.tokenizer import GenerationDefaults


def read_defaults(values: Mapping[str, Any], names: Mapping[str, str]) -> GenerationDefaults:
    """`names`: what the file calls each field. Raises CheckpointError for a value that no request may have:
    otherwise every request that leaves the field to the model would be refused."""
    found: dict[str, Any] = {}
    for field, name in names.items():
        value = values.get(name)
        if field == "top_k" and value == -1:  # how several engines write "off"
            value = 0
        if value is not None:
            _check(field, name, value)
            found[field] = value
    return GenerationDefaults(**found)


def _check(field: str, name: str, value: object) -> None:
    kind, wanted = (int, "an integer") if field == "top_k" else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise CheckpointError(f"{name} must be {wanted}, got {value!r}")
    parameters: dict[str, Any] = {field: value}
    try:
        SamplingParams(**parameters)
    except InvalidRequestError as error:
        raise CheckpointError(f"{name}: {error}") from error
