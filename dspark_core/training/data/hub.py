"""Prompts of a Hugging Face dataset, through the optional `datasets` library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import islice

from dspark_core.errors import ConfigError
from dspark_core.training.data.prompts import Prompt, parse_prompt


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
    """Rows are streamed, not downloaded whole. `name` may be a local directory.

    `column` holds one message; None: rows look like those of prompt files. Raises ConfigError when
    the library, the dataset or the network is missing, naming the dataset, and the row that is wrong.
    """
    require_datasets()
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(islice(rows, limit), start=1):
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
