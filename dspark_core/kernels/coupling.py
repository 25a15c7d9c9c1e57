"""Coupled draws from whole rows of logits; `dspark_core.algorithms.coupling` is the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from dspark_core.kernels.laws import law_array
from dspark_core.kernels.library import Kernels, struct_function
from dspark_core.records import SamplingParams


class _CoupledRowsStruct(ctypes.Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("laws", c_void_p),
        ("seeds", c_void_p),
        ("positions", c_void_p),
        ("tokens", c_void_p),
        ("rows", c_int32),
        ("vocab", c_int32),
        ("threads", c_int32),
    )


def sample_coupled(
    kernels: Kernels, logits: Tensor, params: Sequence[SamplingParams], seeds: Tensor, positions: Tensor
) -> Tensor:
    """logits [rows, vocab] float32; params of each row, temperatures above 0; seeds, positions [rows]
    int64 -> tokens [rows]."""
    rows, vocab = logits.shape
    if logits.dtype is not torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    if (len(params), len(seeds), len(positions)) != (rows, rows, rows):
        raise ValueError(
            f"{len(params)} laws, {len(seeds)} seeds and {len(positions)} positions for {rows} rows of logits"
        )
    logits, seeds, positions = logits.contiguous(), seeds.contiguous(), positions.contiguous()
    laws = law_array(params)
    tokens = torch.empty(rows, dtype=torch.int64)
    struct_function(kernels, "dspark_sample_coupled", _CoupledRowsStruct)(
        ctypes.byref(
            _CoupledRowsStruct(
                logits=logits.data_ptr(),
                laws=ctypes.addressof(laws),
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
