"""Consoles for tables that must not lose figures."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

PIPED_COLUMNS = 200
"""Of what is no terminal. rich takes 80 there, and cuts every column that does not fit."""


def table_console() -> Console:
    """On standard output; as wide as the terminal, or as COLUMNS says."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    return console


def open_table(title: str) -> Table:
    """Without lines between columns, which cost three characters each: many figures fit into 80 columns."""
    return Table(title=title, box=None, padding=(0, 1, 0, 0))
