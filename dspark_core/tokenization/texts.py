"""What JSON can spell and is no text: half of a surrogate pair, which tokenizers do not take."""

from __future__ import annotations


def lone_surrogate(text: str) -> str | None:
    """The first one and where it is; None: it is text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the lone surrogate {text[error.start]!r} at character {error.start}"
    return None
