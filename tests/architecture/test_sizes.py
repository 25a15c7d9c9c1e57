"""Files and functions stay small enough to be read in one go."""

import pytest

from tests.support.source_tree import Source, tracked_sources

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


@pytest.mark.parametrize("source", tracked_sources(), ids=lambda source: source.path)
def test_sizes(source: Source):
    lines = len(source.text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{source.path} has {lines} lines, at most {MAX_FILE_LINES}"
    long = [(name, length) for name, length in source.functions() if length > MAX_FUNCTION_LINES]
    assert long == [], f"functions of {source.path} over {MAX_FUNCTION_LINES} lines"


def test_lengths_are_counted_from_the_signature_to_the_last_line():
    text = "@decorator\ndef outer():\n    def inner():\n        pass\n    return inner\n"
    assert dict(Source("x.py", text).functions()) == {"outer": 4, "inner": 2}


def test_nothing_is_called_utils():
    named = [
        s.path
        for s in tracked_sources()
        if s.path.rpartition("/")[2] in ("utils.py", "util.py", "helpers.py")
    ]
    assert named == []
