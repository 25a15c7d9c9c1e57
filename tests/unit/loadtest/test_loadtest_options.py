"""Option values are checked before a run starts; each error names the option and the value."""

import argparse

import pytest

from loadtest.options import add_options


class PlainParser(argparse.ArgumentParser):
    """argparse without locust's extra keywords."""

    def add_argument(self, *flags, is_secret=False, **options):
        return super().add_argument(*flags, **options)


@pytest.fixture
def parser() -> PlainParser:
    plain = PlainParser(exit_on_error=False)
    add_options(plain)
    return plain


def test_defaults_promise_nothing(parser):
    chosen = parser.parse_args([])
    assert (chosen.min_tokens_per_second, chosen.promise_share, chosen.requests) == (0.0, 0.95, 0)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--min-tokens-per-second", "-1", "must be >= 0, got -1"),
        ("--min-tokens-per-second", "nan", "must be >= 0, got nan"),
        ("--min-tokens-per-second", "fast", "must be a number, got 'fast'"),
        ("--promise-share", "0", r"must be in \(0, 1\], got 0"),
        ("--max-tokens", "0", "must be >= 1, got 0"),
        ("--max-tokens", "1.5", "must be a whole number, got '1.5'"),
        ("--requests", "-1", "must be >= 0, got -1"),
        ("--report-json", "nowhere/r.json", "must be a file that can be written, got 'nowhere/r.json'"),
        ("--report-json", "/", "must be a file that can be written, got '/'"),
        ("--temperature", "2.1", r"must be in \[0, 2\], got 2.1"),
    ],
)
def test_senseless_values_are_refused(parser, option, value, complaint):
    with pytest.raises(argparse.ArgumentError, match=complaint) as refusal:
        parser.parse_args([f"{option}={value}"])
    assert refusal.value.argument_name == option
