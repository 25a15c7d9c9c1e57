"""Describes the machine and software an evaluation ran on, for its result file."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("dspark", "torch", "transformers", "numpy", "gguf", "tokenizers")


def describe_environment(now: datetime) -> dict[str, object]:
    return {
        "date": now.isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
