"""Checkpoints to resume a run from: written atomically, with only the latest few kept."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dspark_core.errors import CheckpointError, ConfigError

_NAME = re.compile(r"step-(\d{8})\.pt")


class Checkpoints:
    def __init__(self, directory: Path, keep: int) -> None:
        """keep: number of latest checkpoints to keep."""
        if keep < 1:
            raise ConfigError(f"keep must be >= 1, got {keep}")
        self._directory = directory
        self._keep = keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Being killed here leaves the earlier checkpoints intact. Raises OSError naming the file."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"step-{step:08d}.pt"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            partial.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written: {error}") from error
        for old in self._paths()[: -self._keep]:
            old.unlink()

    def latest(self) -> Path | None:
        paths = self._paths()
        return paths[-1] if paths else None

    def load(self, path: Path) -> dict[str, Any]:
        """Raises CheckpointError naming the file."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error!r}") from error
        return state

    def clear(self) -> None:
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        """Sorted by step."""
        return sorted(path for path in self._directory.glob("step-*.pt") if _NAME.fullmatch(path.name))
