"""JSON of chunks that differ in one text: serialised once, then filled in for every token."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic_core import to_json

PLACE = "\x01text\x01"
"""Placeholder for the text."""


class ChunkTemplate:
    def __init__(self, chunk: BaseModel) -> None:
        """chunk: one or more of its texts are `PLACE`. Unset fields are left out, as in other chunks."""
        self._around = chunk.model_dump_json(exclude_unset=True).split(_text(PLACE))
        if len(self._around) == 1:
            raise ValueError(f"a template needs a place for a text, got {chunk!r}")

    def filled(self, text: str) -> str:
        return _text(text).join(self._around)


def _text(value: str) -> str:
    return to_json(value).decode()
