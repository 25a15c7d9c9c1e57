"""Reads and writes safetensors files with normal file permissions and informative errors."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
from safetensors import safe_open
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises SafetensorError or OSError."""
    mode = _mode_of_new_files(path)
    safetensors.torch.save_file(dict(tensors), path)
    path.chmod(mode)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Raises SafetensorError or OSError."""
    mode = _mode_of_new_files(path)
    safetensors.numpy.save_file(dict(arrays), path, dict(metadata))
    path.chmod(mode)


def open_tensors(path: Path, framework: str = "pt") -> safe_open:
    """Raises SafetensorError or OSError. Opened first, as safe_open reports unreadable files as missing."""
    with path.open("rb"):
        return safe_open(path, framework=framework)


def _mode_of_new_files(path: Path) -> int:
    """Mode that umask and folder give a new file next to `path`: safetensors makes files readable by their
    owner only, but services run as other users. Tries it, as reading the umask resets it for all threads."""
    trial = path.with_name(path.name + ".mode")
    trial.touch()
    try:
        return stat.S_IMODE(trial.stat().st_mode)
    finally:
        trial.unlink()
