"""What a checkpoint file offers a loader, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.kernels.matrix import QuantizedRows

_SUMMED_VALUES = 2**18
"""At a time: of 16-bit values PyTorch sums a copy in float32, which of all would be twice the tensor."""


class TensorSource(Protocol):
    """Named tensors whose shapes are known before their data is read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By Hugging Face name, without the `model.` prefix."""
        ...

    def describe(self, name: str) -> str:
        """The file, and the name the tensor has in it; for messages."""
        ...

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError when the data cannot be read or are no finite numbers."""
        ...


class WeightSource(TensorSource, Protocol):
    """A target's checkpoint, whose matrices may be quantised."""

    def read_quantized(self, name: str) -> QuantizedRows | None:
        """The matrix in the blocks the file holds, where the kernels compute with them; else None."""
        ...


def checked_finite(source: TensorSource, name: str, values: Tensor) -> Tensor:
    """`values` of the tensor: all of them, or the scales of its blocks. Raises CheckpointError where one is
    infinite or no number, as of a damaged file: every answer would be made of noise, without any error."""
    # A sum meets each of them in one pass over memory; no weights add up to more than float32 holds.
    parts = torch.split(values.flatten(), _SUMMED_VALUES) if values.is_floating_point() else ()
    if not all(math.isfinite(part.sum(dtype=torch.float32)) for part in parts):
        raise CheckpointError(f"{source.describe(name)}: holds values that are infinite or no numbers")
    return values


def check_shapes(
    source: TensorSource,
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored: Collection[str] = (),
) -> None:
    """Raises CheckpointError unless the source holds exactly the expected tensors."""
    found = source.shapes
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source.describe(name)}: missing tensor, expected shape {list(shape)}")
        if found[name] != shape:
            raise CheckpointError(
                f"{source.describe(name)}: shape {list(found[name])}, the configuration needs {list(shape)}"
            )
    for name, shape in found.items():
        if name not in expected and name not in ignored:
            raise CheckpointError(
                f"{source.describe(name)}: unexpected tensor of shape {list(shape)}, "
                "the configuration has no place for it"
            )
