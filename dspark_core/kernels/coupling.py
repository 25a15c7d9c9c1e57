"""Coupled draws from whole rows of weights; `dspark_core.algorithms.coupling` is the reference."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_void_p

import torch
from torch import Tensor

from dspark_core.kernels.library import Kernels


class _CoupledRowsStruct(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("seeds", c_void_p),
        ("positions", c_void_p),
        ("tokens", c_void_p),
        ("rows", c_int32),
        ("vocab", c_int32),
        ("threads", c_int32),
    )


def sample_coupled(kernels: Kernels, weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """weights [rows, vocab] float32, non-negative; seeds, positions [rows] int64 -> tokens [rows].

    A constant factor on a row's weights cannot change its draw.
    """
    function = kernels.functions.dspark_sample_coupled
    function.restype, function.argtypes = None, (POINTER(_CoupledRowsStruct),)
    rows, vocab = weights.shape
    if weights.dtype is not torch.float32 or (len(seeds), len(positions)) != (rows, rows):
        raise ValueError(f"{len(seeds)} seeds and {len(positions)} positions for {weights.shape} weights")
    weights, seeds, positions = weights.contiguous(), seeds.contiguous(), positions.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    function(
        ctypes.byref(
            _CoupledRowsStruct(
                weights=weights.data_ptr(),
                seeds=seeds.data_ptr(),
                positions=positions.data_ptr(),
                tokens=tokens.data_ptr(),
                rows=rows,
                vocab=vocab,
                threads=torch.get_num_threads(),
            )
        )
    )
    return tokens
