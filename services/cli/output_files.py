"""What commands write: checked before the long work whose result would be lost, and named where it
cannot be written in the end. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from dspark_core.errors import ConfigError, DSparkError


def require_writable(path: Path) -> None:
    """Makes the folder of a file to write. Raises ConfigError before the long work."""
    if path.is_dir():
        raise ConfigError(f"--out must be a file, got the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent}: {error}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write to {path}: no permission")


def write_output(path: Path, text: str) -> None:
    """Raises DSparkError naming the file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DSparkError(f"{path} cannot be written: {error}") from error


def require_directory(path: Path) -> None:
    """Raises ConfigError where a file stands in the way of a directory that is yet to be made."""
    nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out must be a directory, got the file {nearest}")
