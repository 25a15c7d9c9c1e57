"""Modules whose weights have shapes but neither memory nor values, until a checkpoint provides them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoValues(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"]
        return func(*args, **given)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Everything built in this block is on the meta device, and initialisation does nothing. Tables are
    computed under `with torch.device("cpu")`.

    PyTorch draws normal values, and computes, on the meta device by code that imports its compiler. This
    takes a second or more and, where Triton is installed, ends the process with warnings about leaks.
    """
    with torch.device("meta"), _NoValues():
        yield
