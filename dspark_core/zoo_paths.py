"""Finds drafters and n-gram tables on disk by name. No torch, so every service can use it."""

from __future__ import annotations

from pathlib import Path

from dspark_core.errors import ConfigError

DEFAULT_DRAFTER = "smollm2-135m-instruct-dspark"
"""Drafter of the demo model, shipped with this package."""
NO_DRAFTER = "none"
"""Instead of a drafter's name: drafts are only looked up, if at all."""

BASELINES = tuple(f"smollm2-135m-instruct-{kind}" for kind in ("dflash", "dflash-5", "eagle3", "mtp1"))
"""Drafters to compare with. Wheels and images leave them out (pyproject.toml, .dockerignore)."""

NGRAMS_AUTO, NO_NGRAMS = "auto", "none"
"""The table shipped for the target's name, if any; no table."""
_NGRAMS_SUFFIX, _NGRAMS_FILE = "-ngrams", "ngrams.safetensors"

_ZOO = Path(__file__).parent / "zoo"


def resolve_drafter_path(name: str = DEFAULT_DRAFTER) -> Path:
    """A checkpoint directory, given by path or by the name of a shipped drafter.

    Raises:
        ConfigError: neither exists; the message lists the shipped drafters.
    """
    shipped = shipped_drafters()
    if name.lower() in shipped:
        return _ZOO / name.lower()
    path = Path(name).expanduser()
    if not name or not path.is_dir():
        if name.lower() in BASELINES:
            raise ConfigError(
                f"drafter {name!r} is a baseline and not part of this installation: give the path of "
                f"dspark_core/zoo/{name.lower()} in a checkout of the source, or install that with "
                "`pip install --editable`"
            )
        names = ", ".join(shipped) or "none"
        raise ConfigError(f"drafter {name!r} not found: give a checkpoint directory or one of: {names}")
    return path


def shipped_drafters() -> tuple[str, ...]:
    """Names of the drafters in the zoo, sorted."""
    return tuple(sorted(config.parent.name for config in _ZOO.glob("*/config.json")))


def resolve_ngrams_path(name: str, target_model: str) -> Path | None:
    """A table's file, given by path, by the name of a shipped table, or by `auto`; None: use no table.

    Raises ConfigError for an unknown name; the message lists the shipped tables.
    """
    if name == NO_NGRAMS:
        return None
    shipped = shipped_ngrams()
    if name == NGRAMS_AUTO:
        own = target_model.lower() + _NGRAMS_SUFFIX
        return _ZOO / own / _NGRAMS_FILE if own in shipped else None
    if name.lower() in shipped:
        return _ZOO / name.lower() / _NGRAMS_FILE
    path = Path(name).expanduser()
    if not name or not path.is_file():
        names = ", ".join((*shipped, NGRAMS_AUTO, NO_NGRAMS))
        raise ConfigError(f"table of n-grams {name!r} not found: give a file or one of: {names}")
    return path


def shipped_ngrams() -> tuple[str, ...]:
    """Names of the tables in the zoo, sorted."""
    return tuple(sorted(file.parent.name for file in _ZOO.glob(f"*{_NGRAMS_SUFFIX}/{_NGRAMS_FILE}")))
