"""Thoughts stand apart from answers in a terminal, and are left out where only the answer is wanted."""

import io

import pytest

from services.cli.serving.answer_writer import AnswerWriter
from services.cli.serving.client import ChatPiece

PIECES = (
    ChatPiece(text="", reasoning="Hm"),
    ChatPiece(text="", reasoning="."),
    ChatPiece(text="Yes"),
    ChatPiece(text="."),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(out: io.StringIO, thoughts: io.StringIO | None) -> str:
    writer = AnswerWriter(out, thoughts)
    for piece in PIECES:
        writer.write(piece)
    return out.getvalue()


def test_a_terminal_shows_the_thought_dimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    assert written(out, out) == "\033[2mHm\033[22m\033[2m.\033[22m\n\nYes."


def test_what_follows_a_cut_thought_has_lines_of_its_own() -> None:
    thoughts = io.StringIO()
    writer = AnswerWriter(io.StringIO(), thoughts)
    writer.write(PIECES[0])
    writer.end_thought()
    writer.end_thought()
    assert thoughts.getvalue() == "Hm\n\n"


def test_a_file_gets_no_colours_and_the_answer_alone_if_asked() -> None:
    out, thoughts = io.StringIO(), io.StringIO()
    assert written(out, out) == "Hm.\n\nYes."
    assert written(io.StringIO(), thoughts) == "Yes."
    assert thoughts.getvalue() == "Hm.\n\n"
    assert written(io.StringIO(), None) == "Yes."
