"""Coupled draws of target rows by the fastest way to be had."""

from __future__ import annotations

from torch import Tensor

from dspark_core.algorithms import coupling
from dspark_core.kernels import coupling as native
from dspark_core.kernels.library import native_kernels


def sample_coupled(weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """weights [rows, vocab] float32; seeds, positions [rows] int64 -> token ids [rows] int64.

    Both ways draw the same tokens, except where two races are equal but for a logarithm's last bit.
    """
    kernels = native_kernels() if weights.device.type == "cpu" else None
    if kernels is None:
        return coupling.sample_coupled(weights, seeds, positions)
    return native.sample_coupled(kernels, weights, seeds, positions)
