import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.stop_strings import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    return shown + matcher.flush(), matcher.matched


def first_stop(stops: list[str], text: str) -> int | None:
    """Where the output ends: before the stop string that is complete first, the longest if several are."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
@example(["aab"], ["a", "aa", "ab"])
@example(["b", "ab"], ["cab"])
@example(["abab", "ba"], ["aba"])
def test_output_ends_before_the_first_stop_string_wherever_pieces_are_cut(stops, pieces) -> None:
    text = "".join(pieces)
    cut = first_stop(stops, text)
    assert run(stops, pieces) == ((text, False) if cut is None else (text[:cut], True))


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1), st.lists(st.text("abc", max_size=3)))
def test_no_text_is_shown_that_a_later_piece_could_take_back(stops, pieces) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for index, piece in enumerate(pieces):
        shown += matcher.push(piece)
        cut = first_stop(stops, "".join(pieces))
        assert cut is None or len(shown) <= cut, index


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("two\n\nUs") == "\ntwo"
    assert matcher.push("e") == ""
    assert matcher.push(" it") == "\n\nUse it"
    assert matcher.flush() == ""


def test_text_held_back_is_given_once() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.push("a ST") == "a "
    assert (matcher.flush(), matcher.flush()) == ("ST", "")


def test_nothing_comes_after_a_match() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.push("a STOP b") == "a "
    assert matcher.matched
    assert matcher.push("c") == matcher.flush() == ""


def test_a_stop_string_may_begin_in_one_that_came_too_early() -> None:
    matcher = StopStrings(["aa"])
    assert matcher.push("aa", early=True) == "a"
    assert matcher.push("ab") == ""
    assert matcher.matched


def test_without_stop_strings_text_passes_through() -> None:
    assert run([], ["a", "b"]) == ("ab", False)


@pytest.mark.timeout(30)
def test_long_stop_strings_cost_linear_time() -> None:
    stop = "a" * 1000 + "b"
    assert run([stop], ["a" * 100] * 2000) == ("a" * 200_000, False)
