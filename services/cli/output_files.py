"""Output files of commands, checked before long work so that its result is not lost.

No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from dspark_core.errors import ConfigError, DSparkError


def require_writable(path: Path, option: str = "--out") -> None:
    """Creates the parent directory of an output file. Raises ConfigError if the file cannot be written."""
    if path.is_dir():
        raise ConfigError(f"{option} must be a file, got the directory {path}")
    _make(path.parent)
    _require_permission(path if path.exists() else path.parent)


def require_writable_folder(folder: Path) -> None:
    """Creates the directory. Raises ConfigError if it cannot be written to."""
    _make(folder)
    _require_permission(folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error


def _require_permission(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write to {path}: no permission")


def write_output(path: Path, text: str) -> None:
    """Raises DSparkError naming the file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DSparkError(f"{path} cannot be written: {error}") from error


def require_directory(path: Path) -> None:
    """Raises ConfigError if a file is in the way of a directory that will be created later."""
    nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out must be a directory, got the file {nearest}")
