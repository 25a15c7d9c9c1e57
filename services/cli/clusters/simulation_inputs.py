"""Input files of `dspark replay` and `dspark simulate`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.errors import ConfigError
from dspark_core.simulation.domains import DEFAULTS

DEFAULT_ROUND_TIME = DEFAULTS.with_name("round-time.json")
"""Round times of the demo model, on the machine named in the file."""


def read_round_time(path: Path) -> RoundTimeModel:
    """Reads a profile of `dspark profile`, or a bare curve. Raises ConfigError naming the file."""
    document = read_mapping(path)
    try:
        return RoundTimeModel.from_dict(document.get("round_time", document))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads JSON, or YAML if the name ends in .yaml or .yml. Raises ConfigError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    document = _parse_yaml(path, text) if path.suffix in (".yaml", ".yml") else _parse_json(path, text)
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise ConfigError(f"{path} must be an object with named fields")
    return document


def _parse_json(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _parse_yaml(path: Path, text: str) -> object:
    if importlib.util.find_spec("yaml") is None:
        raise ConfigError(f"{path}: YAML needs pyyaml: pip install 'dspark[simulate]', or write JSON")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
