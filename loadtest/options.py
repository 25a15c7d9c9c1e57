"""The load test's own command-line options, in addition to locust's."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Parser(Protocol):
    """The part of argparse used here; locust's parser is a subclass with extra options."""

    def add_argument(self, *flags: str, **options: object) -> object: ...


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "--min-tokens-per-second",
        type=_number(lambda value: value >= 0, ">= 0"),
        default=0.0,
        help="promised tokens/s of a chat; the run exits with 1 if it is not kept (default: 0, no promise)",
    )
    parser.add_argument(
        "--max-first-token-ms",
        type=_number(lambda value: value >= 0, ">= 0"),
        default=0.0,
        help="promised time to the first token, likewise (default: 0, no promise)",
    )
    parser.add_argument(
        "--promise-share",
        type=_number(lambda value: 0 < value <= 1, "in (0, 1]"),
        default=0.95,
        help="share of chats that must keep the promises (default: 0.95)",
    )
    parser.add_argument("--model", default="", help="model to ask (default: the first of /v1/models)")
    parser.add_argument(
        "--max-tokens", type=_count(1), default=128, help="longest answer, in tokens (default: 128)"
    )
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="ignore the model's stop tokens, so that every answer is --max-tokens long",
    )
    parser.add_argument(
        "--temperature",
        type=_number(lambda value: 0 <= value <= 2, "in [0, 2]"),
        default=0.0,
        help="sampling temperature (default: 0)",
    )
    parser.add_argument(
        "--speculation",
        choices=("on", "off"),
        default="on",
        help="whether to ask for speculative decoding (default: on)",
    )
    parser.add_argument(
        "--requests",
        type=_count(0),
        default=0,
        help="end the run after this many chats; not with several processes (default: 0, no limit)",
    )
    parser.add_argument("--api-key", default="", help="API key, sent as a bearer token", is_secret=True)
    parser.add_argument(
        "--report-json", type=_writable, default="", help="write the report to this file as JSON"
    )


def _writable(text: str) -> str:
    """Checked before the run, because failing afterwards would lose the measurements."""
    path = Path(text)
    if text and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise ArgumentTypeError(f"must be a file that can be written, got {text!r}")
    return text


def _number(valid: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not valid(value):
            raise ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return parse


def _count(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < minimum:
            raise ArgumentTypeError(f"must be >= {minimum}, got {value}")
        return value

    return parse
