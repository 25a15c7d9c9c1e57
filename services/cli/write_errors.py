"""What the system refuses a command, such as room on a disk, as an error that says how to go on."""

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
    except (OSError, SafetensorError) as error:  # of a disk that others filled meanwhile, say
        raise DSparkError(f"{error}; {how_to_go_on}") from error
