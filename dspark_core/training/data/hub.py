"""Prompts of a Hugging Face dataset, through the optional `datasets` library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dspark_core.errors import ConfigError
from dspark_core.training.data.prompts import Prompt, parse_prompt

SAVED_MARKS = ("dataset_dict.json", "state.json")
"""Files by which a `save_to_disk` folder of several splits, or of one, is recognised."""


def require_datasets() -> None:
    """Raises ConfigError when the library is missing; call it before loading anything else."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("--dataset needs the package datasets: pip install 'dspark[data]'")


def read_dataset(
    name: str,
    *,
    subset: str | None = None,
    split: str = "train",
    column: str | None = None,
    limit: int | None = None,
) -> Iterator[Prompt]:
    """Streams the rows instead of downloading the whole dataset. `name` may also be a local directory of data
    files, or one written by `save_to_disk`.

    `column` holds one message; None: rows look like those of prompt files. Raises ConfigError when the
    library, the dataset or the network is missing, and for a malformed row, which it names.
    """
    require_datasets()
    try:
        for number, row in enumerate(islice(_rows(name, subset, split), limit), start=1):
            where = f"dataset {name}, row {number}"
            if column is None:
                yield parse_prompt(row, where, source=name)
            elif column in row:
                yield parse_prompt({**row, "prompt": row[column]}, where, source=name)
            else:
                raise ConfigError(f"{where} has no {column!r}; its fields are: {', '.join(row)}")
    except (ConfigError, GeneratorExit):
        raise
    except Exception as error:  # the library passes on whatever its many readers and clients raise
        raise ConfigError(
            f"dataset {name!r} (split {split!r}) cannot be read: {type(error).__name__}: {error}; "
            "is the name right, and the network there?"
        ) from error


def _rows(name: str, subset: str | None, split: str) -> Iterable[dict[str, Any]]:
    from datasets import Dataset, load_dataset, load_from_disk

    rows: Iterable[dict[str, Any]]
    if subset or not any((Path(name) / mark).is_file() for mark in SAVED_MARKS):
        rows = load_dataset(name, subset, split=split, streaming=True)
        return rows
    # load_dataset guesses the splits of a save_to_disk folder from known names, or refuses it.
    # load_from_disk memory-maps the files rather than reading them whole.
    saved = load_from_disk(name)
    if not isinstance(saved, Dataset) and split not in saved:
        raise ConfigError(f"dataset {name} has no split {split!r}; its splits are: {', '.join(saved)}")
    rows = saved if isinstance(saved, Dataset) else saved[split]
    return rows
