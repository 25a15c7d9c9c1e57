"""Consoles and tables that never truncate figures."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

PIPED_COLUMNS = 200
"""Width when the output is not a terminal. rich would assume 80 columns and truncate what does not fit."""


def table_console() -> Console:
    """Writes to standard output, as wide as the terminal, as COLUMNS says, or `PIPED_COLUMNS`."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    return console


def open_table(title: str) -> Table:
    """A table without column rules, which cost three characters each, so that more fits into 80 columns."""
    return Table(title=title, box=None, padding=(0, 1, 0, 0))
