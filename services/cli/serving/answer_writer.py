"""Writes an answer to a terminal as it arrives, its thought dimmed."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

from services.cli.serving.client import ChatPiece

_BLANK_LINE = "\n\n"


class AnswerWriter:
    def __init__(self, out: TextIO, thoughts: TextIO | None) -> None:
        """thoughts: where to write them; None: nowhere."""
        self._out = out
        self._thoughts = thoughts
        self._dim = thoughts is not None and Console(file=thoughts).color_system is not None
        self._thought = False

    def write(self, piece: ChatPiece) -> None:
        if piece.reasoning and self._thoughts is not None:
            self._thought = True
            self._write(self._thoughts, f"\033[2m{piece.reasoning}\033[22m" if self._dim else piece.reasoning)
        if piece.text:
            self.end_thought()
            self._write(self._out, piece.text)

    def end_thought(self) -> None:
        """Also for an answer that was cut inside its thought."""
        if self._thought and self._thoughts is not None:
            self._thought = False
            self._write(self._thoughts, _BLANK_LINE)

    def _write(self, stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()
