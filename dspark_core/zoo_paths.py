"""Where a drafter named on the command line lies on disk; no torch, so every service can ask."""

from __future__ import annotations

from pathlib import Path

from dspark_core.errors import ConfigError

DEFAULT_DRAFTER = "smollm2-135m-instruct-dspark"
"""Drafter of the demo model, shipped with this package."""

_ZOO = Path(__file__).parent / "zoo"


def resolve_drafter_path(name: str = DEFAULT_DRAFTER) -> Path:
    """A checkpoint directory, by path or by the name of a shipped drafter.

    Raises:
        ConfigError: nothing lies there; the message lists the shipped drafters.
    """
    shipped = shipped_drafters()
    if name.lower() in shipped:
        return _ZOO / name.lower()
    path = Path(name).expanduser()
    if not name or not path.is_dir():
        names = ", ".join(shipped) or "none"
        raise ConfigError(f"drafter {name!r} not found: give a checkpoint directory or one of: {names}")
    return path


def shipped_drafters() -> tuple[str, ...]:
    """Names of the drafters in the zoo, sorted."""
    return tuple(sorted(config.parent.name for config in _ZOO.glob("*/config.json")))
