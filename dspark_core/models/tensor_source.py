"""Interface of checkpoint files to a loader, independent of format."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.kernels.matrix import QuantizedRows

_SUMMED_VALUES = 2**18
"""Values summed at a time: PyTorch sums 16-bit values via a float32 copy, twice the size of its input."""


class TensorSource(Protocol):
    """Named tensors whose shapes are known before their data is read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by Hugging Face name, without the `model.` prefix."""
        ...

    def describe(self, name: str) -> str:
        """The file and the tensor's name in it, for messages."""
        ...

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError if the data cannot be read or is not finite."""
        ...


class WeightSource(TensorSource, Protocol):
    """A target's checkpoint, with possibly quantised matrices."""

    def read_quantized(self, name: str) -> QuantizedRows | None:
        """The matrix in the file's quantised blocks if the kernels support them, else None."""
        ...


def checked_finite(source: TensorSource, name: str, values: Tensor) -> Tensor:
    """Returns `values`, all values of the tensor or the scales of its blocks. Raises CheckpointError if any
    is not finite, as in a damaged file, which would otherwise yield garbage without any error."""
    # A sum covers all values in one pass over memory; no weights add up to more than float32 holds.
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
