"""Thoughts are told from answers, wherever the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.tokenization.thoughts import MARKS
from services.gateway.thoughts.thought_stream import ThoughtStream

THINK = MARKS[0]


def split(text: str, size: int, *, begun: bool = False) -> tuple[str, str]:
    stream = ThoughtStream(THINK, begun=begun)
    parts = [stream.push(text[place : place + size]) for place in range(0, len(text), size)]
    held = stream.flush()
    assert sum(part.aside + len(part.answer) for part in [*parts, held]) == len(text)
    return "".join(part.thought for part in [*parts, held]), "".join(part.answer for part in [*parts, held])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nHm: a < b.\n\nSo.\n</think>\n\nYes.", "Hm: a < b.\n\nSo.", "Yes."),
        ("\n<think></think>Yes.\n", "", "Yes.\n"),
        ("<think>\n \n</think>\n\n", "", ""),
        ("<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
        ("<think>cut </thi", "cut </thi", ""),
        ("<think>cut \n", "cut", ""),
        ("<thinking> aloud", "", "<thinking> aloud"),
        (" <thi", "", " <thi"),
        ("  Yes. <think>", "", "  Yes. <think>"),
        ("Yes.</think>No.", "", "Yes.</think>No."),
        ("", "", ""),
    ],
)
def test_an_answer_may_begin_with_a_thought(size, text, thought, answer) -> None:
    assert split(text, size) == (thought, answer)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("\n<think>\nHm.\n</think>\nYes.", "Hm.", "Yes."),
        ("</think>Yes.", "", "Yes."),
        ("Hm. </think", "Hm. </think", ""),
        ("<thi", "<thi", ""),
        (" \n", "", ""),
    ],
)
def test_an_answer_may_begin_inside_a_thought(size, text, thought, answer) -> None:
    assert split(text, size, begun=True) == (thought, answer)


@given(st.text(alphabet="a \n<>/think", max_size=40), st.integers(1, 7), st.booleans())
def test_cuts_make_no_difference(text, size, begun) -> None:
    assert split(text, size, begun=begun) == split(text, len(text) + 1, begun=begun)
