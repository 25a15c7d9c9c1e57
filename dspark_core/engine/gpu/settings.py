"""What an engine on a GPU needs: kernels, a recorder for its passes, and the sizes to record."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_core.engine.gpu.attention import AttentionKernels
from dspark_core.engine.gpu.buckets import BucketGrid, default_grid
from dspark_core.engine.gpu.recorded import CudaGraphs, Recorder

_log = logging.getLogger(__name__)

MAX_GRAPH_REQUESTS = 64
"""Larger decoding batches are computed launch by launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSettings:
    kernels: AttentionKernels
    grid: BucketGrid
    recorder: Recorder | None
    """None: passes are not recorded."""


def missing_for_kernels() -> str | None:
    """Why our kernels cannot be used on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    compilers = (os.environ.get("CC", ""), "gcc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C compiler for triton"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "there are no headers of Python for triton to compile against"
    return None


def gpu_settings(
    device: torch.device, *, block_size: int | None, looked_up: int | None = None, graphs: bool = True
) -> GpuSettings | None:
    """None on a CPU, and if our kernels cannot be used there (with a warning). `block_size` and `looked_up`
    as in `default_grid`."""
    if device.type != "cuda":
        return None
    missing = missing_for_kernels()
    if missing is not None:
        _log.warning("%s: PyTorch's operators compute on %s, slower", missing, device)
        return None
    # Otherwise split-K products would be reduced in bfloat16, which makes greedy choices unstable.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Imported only here: it needs triton, which only PyTorch's CUDA builds include.
    kernels = importlib.import_module("dspark_core.cuda.paged_attention").TritonKernels.on(device)
    grid = default_grid(MAX_GRAPH_REQUESTS, block_size, looked_up)
    return GpuSettings(kernels=kernels, grid=grid, recorder=CudaGraphs(device) if graphs else None)
