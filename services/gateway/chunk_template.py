"""JSON of chunks that differ in a single text: serialised once, then filled in for every token."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic_core import to_json

PLACE = "\x01text\x01"
"""Placeholder for the text."""


class ChunkTemplate:
    def __init__(self, chunk: BaseModel) -> None:
        """chunk: contains the text `PLACE` exactly once. Unset fields are left out, as in other chunks."""
        before, place, after = chunk.model_dump_json(exclude_unset=True).partition(_text(PLACE))
        if not place or _text(PLACE) in after:
            raise ValueError(f"a template needs one place for a text, got {chunk!r}")
        self._before, self._after = before, after

    def filled(self, text: str) -> str:
        return f"{self._before}{_text(text)}{self._after}"


def _text(value: str) -> str:
    return to_json(value).decode()
