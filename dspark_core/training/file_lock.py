"""Keeps two processes from writing the same output."""

from __future__ import annotations

import fcntl

from dspark_core.errors import ConfigError


def lock(file: int, what: str) -> None:
    """Locks an open file until it is closed, also by the end of the process. Raises ConfigError if another
    process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(f"another process is writing {what}") from error
