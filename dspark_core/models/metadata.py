"""Typed access to a checkpoint's metadata, with errors that name the file, field and value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dspark_core.errors import CheckpointError, ConfigError

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Metadata:
    """Fields of one file. An absent or null field takes the default, or is an error if there is none."""

    origin: str
    """The file, as named in messages."""
    values: Mapping[str, object]

    def get(self, field: str) -> object:
        """The raw value; None if absent."""
        return self.values.get(field)

    def integer(self, field: str, default: object = _MISSING) -> int:
        """A positive integer."""
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, "must be a positive integer")
        return value

    def natural(self, field: str, default: object = _MISSING) -> int:
        """An integer >= 0."""
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(field, "must be an integer >= 0")
        return value

    def number(self, field: str, default: object = _MISSING) -> float:
        """A positive finite number."""
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(field, "must be a positive number")
        if not (math.isfinite(value) and value > 0):
            raise self.error(field, "must be a positive number")
        return float(value)

    def flag(self, field: str, default: object = _MISSING) -> bool:
        value = self._value(field, default)
        if not isinstance(value, bool):
            raise self.error(field, "must be true or false")
        return value

    def error(self, field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {field}={self.get(field)!r} {problem}")

    def _value(self, field: str, default: object) -> object:
        value = self.values.get(field)
        if value is not None:
            return value
        if default is _MISSING:
            raise CheckpointError(f"{self.origin}: {field} is missing")
        return default


@contextmanager
def naming_file(origin: str) -> Iterator[None]:
    """Adds the file's name to errors about a configuration that came from it."""
    try:
        yield
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error
