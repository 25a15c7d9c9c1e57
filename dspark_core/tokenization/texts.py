"""Validates values of JSON rows that must be non-empty texts or lists."""

from __future__ import annotations

import json

from dspark_core.errors import ConfigError


def lone_surrogate(text: str) -> str | None:
    """Describes the first lone surrogate, which JSON can express but tokenizers reject; None: valid text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the lone surrogate {text[error.start]!r} at character {error.start}"
    return None


def required_text(value: object, where: str) -> str:
    """Raises ConfigError prefixed with `where`."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} must be a non-empty text, got {_shown(value)}")
    if (half := lone_surrogate(value)) is not None:
        raise ConfigError(f"{where} holds {half}, which is no text")
    return value


def required_list(value: object, where: str) -> list[object]:
    """Raises ConfigError prefixed with `where`."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a non-empty list, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:80]
