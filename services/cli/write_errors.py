"""Turns failed writes, such as on a full disk, into errors that say how to continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from dspark_core.errors import DSparkError


@contextmanager
def write_errors(how_to_go_on: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:  # e.g. another process has filled the disk
        raise DSparkError(f"{error}; {how_to_go_on}") from error
