"""`--temperature` and `--top-p`, the same for every command that samples."""

from __future__ import annotations

import argparse


def add_temperature_arguments(
    group: argparse._ActionsContainer, *, temperature: float | None, top_p: float | None
) -> None:
    """The defaults; None: the server's."""
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"sampling temperature; 0 is greedy (default: {_default_text(temperature)})",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help=f"nucleus sampling; 1 is off (default: {_default_text(top_p)})",
    )


def _default_text(default: float | None) -> str:
    return "the model's own" if default is None else f"{default:g}"
