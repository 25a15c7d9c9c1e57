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
"""What `save_to_disk` leaves in a folder of several splits, and of one."""


def require_datasets() -> None:
    """Raises ConfigError, before anything else is loaded."""
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
    """Rows are streamed, not downloaded whole. `name` may be a local directory, of files or one that
    the library saved a dataset to.

    `column` holds one message; None: rows look like those of prompt files. Raises ConfigError when
    the library, the dataset or the network is missing, naming the dataset, and the row that is wrong.
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
    except Exception as error:  # the library lets whatever its many readers and clients raise through
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
    # Of what was saved, load_dataset guesses the splits by names it knows, or refuses it. This maps
    # the files into memory, it does not read them whole.
    saved = load_from_disk(name)
    if not isinstance(saved, Dataset) and split not in saved:
        raise ConfigError(f"dataset {name} has no split {split!r}; its splits are: {', '.join(saved)}")
    rows = saved if isinstance(saved, Dataset) else saved[split]
    return rows
